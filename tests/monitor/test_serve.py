"""The live page: only on loopback, only reading, and what a browser gets from it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from support.metric_runs import training_record, write_metric_run, write_records
from support.served_boards import serving

from ffcv_ssl.errors import UserError
from ffcv_ssl.monitor import __main__ as command
from ffcv_ssl.monitor import serve
from ffcv_ssl.monitor.board import Board


def ask(server, path="/data", host="127.0.0.1", method="GET", **headers):
    """(status, headers, body) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    if host is not None:
        connection.putheader("Host", host)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_a_browser_gets_the_page_and_then_the_news(tmp_path):
    folder = write_metric_run(tmp_path / "a", 10)
    with serving(folder) as server:
        status, headers, page = ask(server, "/")
        assert status == 200 and page.startswith(b"<!DOCTYPE html>")
        assert headers["Cache-Control"] == "no-store"
        first = json.loads(ask(server)[2])
        assert first["runs"][0]["tables"]["training"]["axes"]["step"] == list(range(1, 11))
        write_records(folder, [training_record(11)], "a")
        path = f"/data?boot={first['boot']}&version={first['version']}"
        (news,) = json.loads(ask(server, path)[2])["runs"]
        assert news["tables"]["training"]["axes"]["step"] == [11]
        assert json.loads(ask(server, "/data?boot=x&version=%00")[2])["from"] == 0


def test_a_name_that_is_not_loopbacks_gets_nothing(tmp_path):
    with serving(write_metric_run(tmp_path / "a", 1)) as server:
        for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1.evil", None):
            status, _, body = ask(server, "/data", host)
            assert status == 403 and b"runs" not in body
        for host in ("localhost", "localhost:9", "127.0.0.1", "[::1]:80"):
            assert ask(server, "/data", host)[0] == 200


def test_it_listens_on_loopback_alone_and_only_reads(tmp_path):
    with serving(write_metric_run(tmp_path / "a", 1)) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert ask(server, "/../etc/passwd")[0] == 404
        assert ask(server, "/data", method="POST")[0] == 501
        assert ask(server, "/", method="HEAD")[2] == b""
        assert "Access-Control-Allow-Origin" not in ask(server)[1]


def test_large_answers_are_compressed_for_who_takes_it(tmp_path):
    with serving(write_metric_run(tmp_path / "a", 1)) as server:
        plain, small = ask(server, "/"), ask(server, "/", Accept_Encoding="gzip")
        assert small[1]["Content-Encoding"] == "gzip" and len(small[2]) < len(plain[2]) / 2


def test_a_browser_that_goes_away_is_no_error(tmp_path, capfd):
    with serving(write_metric_run(tmp_path / "a", 1)) as server:
        for request in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET", b"\0\xff\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.server_port)) as client:
                client.sendall(request)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        assert ask(server)[0] == 200
    assert capfd.readouterr().err == ""


def test_a_taken_port_is_one_line(tmp_path, capsys):
    folder = write_metric_run(tmp_path / "a", 1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert command.main([str(folder), "--serve", "--port", str(port)]) == 2
    line = f"--port: {port} is taken; choose another, or leave it out\n"
    assert capsys.readouterr().err == line


def test_a_port_that_may_not_be_had_is_one_line(monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(serve.Server, "server_bind", refuse)
    with pytest.raises(UserError, match=r"--port: 80 cannot be had \(Permission denied\); choose"):
        serve.Server(Board([]), 80)


@pytest.mark.whole
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(tmp_path, number):
    folder = write_metric_run(tmp_path / "a", 1)
    words = [
        sys.executable,
        "-m",
        "ffcv_ssl.monitor",
        str(folder),
        str(tmp_path / "later"),
        "--serve",
    ]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        first = process.stdout.readline()
        assert first.startswith("http://127.0.0.1:") and "Ctrl-C ends it" in first
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert json.loads(out.splitlines()[-1])["status"] == "ended"

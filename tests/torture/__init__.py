"""Faults made on purpose: what the project promises to survive, tried many times.

    make torture               # everything; one to two hours on two cores
    make torture QUICK=1       # a little of everything, in two minutes
    make torture MINUTES=3     # everything, each fault for three minutes at most
    make torture ONLY=kills    # one family, or the faults with these words in their names

A family is a module of this package, a fault one function in it; `frame.py` says how one is
written. RESULTS=benchmarks/results/reliability.json keeps the numbers of a run that is not quick;
`python -m benchmarks.readme` writes them into docs/reliability.md.
"""

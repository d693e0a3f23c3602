"""What to do about messages that only say what is wrong; for docs/errors.md.

Most messages of ffcv-ssl end with a remedy. Those of here pass on the words of another program, or
would repeat what is plain: their cures stand in this table, by fixed words of the message.
"""

from __future__ import annotations

from benchmarks.refusals import Refusal

# With these words a remedy begins.
ACTIONS = (
    "add", "append", "ask", "begin", "call", "check", "choose", "copy", "correct", "define",
    "delete", "do", "end", "evaluate", "export", "fetch", "free", "give", "join", "leave", "list",
    "load", "look", "lower", "make", "move", "name", "open", "override", "put", "raise", "re-write",
    "remove", "rename", "restore", "resume", "run", "save", "scale", "see", "shorten", "start",
    "submit", "take", "update", "use", "wait", "write",
)  # fmt: skip
DAMAGED = "copy the file again, or write it again from its images"
# (words of the message, what to do); the first that fits counts
BY_WORDS = (
    # names and settings
    ("has no attribute", "check the spelling; `ffcv_ssl.__all__` and docs/ have the names"),
    ("parts have moved", "take the new name from ffcv_ssl/moved.py"),
    ("unknown key", "check the spelling; `--help` lists the keys"),
    ("no such configuration file", "check the path, or the name; the project's are in configs/"),
    ("is given twice", "remove one of them"),
    ("expected <in_words>", "give a value of the kind that the line names"),
    ("no such folder", "check the path, and choose one of the folders that are there"),
    ("has no such setting", "leave it out"),
    ("has no splits", "leave out --split"),
    ("not a text file", "give a text file in UTF-8, one entry per line"),
    ("line <line>: <problem>", "correct this line of the YAML file"),
    ("but the run has <number> views", "lower labelled.num_views"),
    ("it has <field_names>", "name one of these fields"),
    ("the file has: <", "name one of these fields, or write the file again with an image field"),
    ("has no train", "give one of these to --split"),
    ("config or about as no mapping", "copy the file again, or export it again"),
    ("the model's settings have", "copy the file again, or export it again"),
    # files and folders
    ("cannot be the run's folder", "choose another --out, or make this one writable for you"),
    ("cannot be listed", "make the folder readable for you, or remove it"),
    ("cannot be opened", "check the path, and that you may read the file"),
    ("cannot be read", "check the path, and that you may read the file"),
    ("cannot be written", "do what the line says: free some space, or choose another place"),
    ("not a regular file", "give the path of a regular file"),
    ("not a run's folder", "give the folder of a run of train.py"),
    ("--subset: <error>", "give a text file of names or indices"),
    ("labels.file: <error>", "give a text file of names or indices"),
    ("format version", "give a .beton file, or write it again"),
    ("jobs submitted before it", "correct what the line says, and submit again; jobs that it names "
     "run on"),
    ("got a file of <st_size> bytes", "remove this file, or make it smaller"),
    ("got more than <max_bytes> bytes", "remove this file, or make it smaller"),
    # images and fields
    ("JPEG is <width>", DAMAGED),
    ("chroma subsampling", "write the image's file again with 4:2:0, or another usual one"),
    ("a readable image", "restore the image, or remove it"),
    ("corrupt image", "restore the image, or remove it"),
    ("not serialisable as JSON", "give plain values: numbers, texts, lists and dicts"),
    ("JSON text", DAMAGED),
    ("class names are not texts", "give texts as class names"),
    ("no torch counterpart", "use an NDArrayField for this type, or store another type"),
    ("its worker process was killed", "use fewer workers if memory was full, and start again"),
    ("its worker process exited", "look for the worker's own lines above, and start again"),
    ("has none", "give one for each of them"),
    # loading
    ("no valid sample to replace it", "write the file again: most of its samples are damaged"),
    ("was altered while open", "leave the file alone while it is read, and start again"),
    ("truncated while open", "leave the file alone while it is read, and start again"),
    ("pipeline '<name>', op", "correct the op as the end of the line says"),
    ("ops <names>: <what>", "correct the ops as the end of the line says"),
    ("set_resolution: found no", "add a RandomResizedCrop to the pipeline, or leave the call out"),
    ("reading <size> bytes", "check the disk and the network, and start again"),
    ("the file has no field", "name a field of the file, or make a view: ('field', [ops])"),
    ("times the number of ranks", "choose a batch size that gives this number of samples"),
    # ops and kernels
    ("which is for images", "leave the op out, or make a view of an image field"),
    ("stands before an image op", "put image ops first, then tensor ops"),
    ("does not compile", "correct what the end of the line says"),
    ("cannot be imported", "correct the import as the end of the line says"),
    ("no compiled function apply", "define apply with @staticmethod and @device"),
    ("no compiled function draw", "define draw with @staticmethod and @device, or set "
     "num_raw_columns to 0"),
    # training and evaluation
    ("no class <class_name>", "name one of these classes, or define this one"),
    ("averages: got other", "restore a kept copy of the checkpoint, or delete it to start again"),
    ("it lacks <key>", "give a file of this network, or name its network with --model.backbone"),
    ("a score that is not finite", "check the features and the scores for NaN"),
    ("no labels in field", "write the file with labels, or choose a method without them"),
    ("sbatch:", "correct the Slurm settings as the line of sbatch says"),
)  # fmt: skip
# The same for messages that also say what they expected, which is then the better cure.
BY_LAST_WORDS = (
    ("settings of <protocol>:", "correct this setting as the end of the line says"),
    ("entry <number>:", "correct this entry of the file as the end of the line says"),
    ("views.view_<index>.<error>", "correct this setting as the end of the line says"),
    ("extra_ops[<i>]: <entry>", "correct this entry as the end of the line says"),
    ("view '<name>': <error>", "correct this view as the end of the line says"),
    ("stages.<name>:", "correct this stage as the end of the line says"),
    ("<path>: <strerror>", "check the path, and that you may read the file"),
    ("field '<name>': <describe>", "correct the value of this sample as the end of the line says"),
    ("sample <sample> (dataset index", "correct the sample as the line says, or leave it out"),
)  # fmt: skip
# (beginning of a path, class of the error, what to do) where no words fit
BY_PLACE = (
    ("ffcv_ssl/reader", "BetonError", DAMAGED),
    ("ffcv_ssl/beton", "BetonError", DAMAGED),
    ("ffcv_ssl/loader", "BetonError", DAMAGED),
)


def cure_by_words(refusal: Refusal) -> str:
    """The cure of the first entry whose words a message has, else an empty text."""
    line = refusal.shown()
    return next((cure for words, cure in BY_WORDS if words in line), "")


def last_cure(refusal: Refusal) -> str:
    """The cure of the first entry for a message that has no better one, else an empty text."""
    line = refusal.shown()
    by_words = (cure for words, cure in BY_LAST_WORDS if words in line)
    by_place = (
        cure
        for place, error, cure in BY_PLACE
        if refusal.file.startswith(place) and refusal.error == error
    )
    return next(by_words, "") or next(by_place, "")

"""Tables of runs as a whole: damaged input, disturbed and started again, out of memory, and mixed."""

from __future__ import annotations

from frame import table

from tables.table import MIB, markdown, read

EVENTS = {
    "kill": "SIGKILL",
    "term": "SIGTERM, sometimes twice",
    "int": "SIGINT, sometimes twice",
    "full": "the disk is full, once or from then on",
    "read_only": "the directory becomes read-only",
    "clock": "the clock is set back a week, then SIGKILL",
    "cache removed": "the base cache is removed",
    "cache replaced": "another base takes the cache's place",
    "second": "a second process is started on the same directory",
    "cut": "a file of the newest checkpoint is cut short",
}
"""What happens to a life, in the words of the table."""


@table()
def moments() -> str:
    """For each event: lives, how many it ended, and how many reached the undisturbed result when started again."""
    rows, table = [], read("moments")["moments"]
    for event, words in EVENTS.items():
        found = [row for name, row in table.items() if name.split(", ")[1] == event]
        counts = {key: sum(row[key] for row in found) for key in ("tried", "stopped", "right")}
        rows.append([words, f"{counts['tried']}", f"{counts['stopped']}", f"{counts['right']} of {counts['tried']}"])
    return markdown(["event, then the same command again", "jobs", "ended by it", "bit for bit equal"], rows)


@table()
def hostile() -> str:
    """For each kind of damaged input: how many ended in one clear line, in the right result, or not noticeably."""
    keys = ("tried", "clear_lines", "right_results", "undetectable", "new_faults", "num_mended")
    parts = read("hostile")["parts"]
    rows = [[name, *(f"{part[key]}" for key in keys)] for name, part in parts.items()]
    header = ["input", "tried", "one clear line", "right result", "the format cannot notice it", "open faults"]
    return markdown([*header, "faults mended"], rows)


@table()
def chat_templates() -> str:
    """For each chat template: turns whose answer, prompt and marks are right."""
    document = read("chat_templates")
    rows = []
    for name, found in document["templates"].items():
        num_refused = sum(found["refused"].values())
        marked = f"{found['as_marked']} of {found['marked']}" if found["marked"] else "no variant"
        rows.append(
            [
                name,
                f"{found['chats']}",
                f"{num_refused}",
                f"{found['texts']}",
                f"{found['turns']}",
                f"{found['answer_and_end']}",
                f"{found['others']}",
                f"{found['served']}",
                marked,
            ]
        )
    header = ["template", "chats", "refused by it", "examples", "turns", "answer and end mark learnt"]
    header += ["words of others learnt", "as a server shows it", "learnt as in the marked variant"]
    reasons = sorted({reason for found in document["templates"].values() for reason in found["refused"]})
    ten = document["ten_turns"]
    note = (
        f"\nA chat of ten turns takes {1e3 * ten['seconds']:.1f} ms; {ten['encoded']:.2f} times its characters are "
        "encoded."
    )
    return markdown(header, rows) + note + (f" Reason of refusals: {'; '.join(reasons)}\n" if reasons else "\n")


@table()
def chat_model() -> str:
    """How many questions the model answers in the trained manner, and stops by itself, before and after training."""
    document = read("chat_model")
    num = document["num_questions"]
    rows = []
    for arm, label in (("base", "before training"), ("trained", "after training")):
        found = document["arms"][arm]
        rows.append([label, *(f"{found[name]} of {num}" for name in ("stopped", "in_manner", "equal"))])
    header = ["model", "stops by itself", "in the trained manner", "equal to the expected answer"]
    passes = f"{document['epochs']} epoch" + ("s" if document["epochs"] > 1 else "")
    note = (
        f"\nSmolLM2-135M-Instruct, {document['num_chats']} conversations, {passes}, {document['num_steps']} steps; "
        f"at most {document['max_new_tokens']} new tokens.\n"
    )
    return markdown(header, rows) + note


@table()
def mixing() -> str:
    """Differences of the shares from the asked ones, and resumes; the memory of streams below."""
    document = read("mixing")
    rows = [
        [
            name,
            f"{mix['max_difference']:.3%}",
            f"{mix['max_relative_difference']:.2%}",
            f"{mix['resumed_exactly']} of {mix['num_points']}",
        ]
        for name, mix in document["mixes"].items()
    ]
    streams = [
        f"{each['kind']}, {each['num_rows']:,} rows: {(each['peak_bytes'] - each['empty_bytes']) / MIB:.0f} MiB, "
        f"resumed exactly from {each['resumed_exactly']} of {each['num_points']} points"
        for each in document["streams"]
    ]
    note = (
        f"\nShares after {document['num_draws']:,} draws from sources as large as the eight commonsense tasks. Memory "
        f"that a stream adds to an empty process over {document['streams'][0]['num_draws']:,} draws: "
        f"{'; '.join(streams)}.\n"
    )
    return markdown(["strategy", "largest error of a share", "relative to the share", "resumed exactly"], rows) + note

"""Tables of what a run draws and keeps."""

from __future__ import annotations

from tables.table import markdown, read


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
        f"{each['kind']}, {each['num_rows']:,} rows: {(each['peak_bytes'] - each['empty_bytes']) / 2**20:.0f} MiB, "
        f"resumed exactly from {each['resumed_exactly']} of {each['num_points']} points"
        for each in document["streams"]
    ]
    note = (
        f"\nShares after {document['num_draws']:,} draws from sources as large as the eight commonsense tasks. Memory "
        f"that a stream adds to an empty process over {document['streams'][0]['num_draws']:,} draws: "
        f"{'; '.join(streams)}.\n"
    )
    return markdown(["strategy", "share off by at most", "relative to the share", "resumed exactly"], rows) + note

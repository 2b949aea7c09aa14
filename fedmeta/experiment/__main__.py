"""`python -m fedmeta.experiment` prints the reference of all keys, which is docs/experiment.md."""

from itertools import groupby

from fedmeta.experiment import describe


def reference() -> str:
    """Returns every section and key with its type, default and help, as Markdown."""
    lines = ["# The experiment file", ""]
    lines += ["Every key has a default; `--set section.key=value` changes one from the command line.", ""]
    for section, keys in groupby(describe(), key=lambda key: key.section):
        lines += [f"## [{section}]", "", "| key | type | default | what it is |", "|---|---|---|---|"]
        for key in keys:
            cells = (f"`{key.key}`", key.type, f"`{key.default}`", key.help)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference(), end="")

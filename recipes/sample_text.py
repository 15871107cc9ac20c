"""Real text that every Python has: docstrings as public text, the language reference as private."""

import ast
import pydoc_data.topics
import sysconfig
from pathlib import Path


def write_samples(folder: Path) -> tuple[Path, Path, Path]:
    """Write public.txt, private.txt and test.txt; the test text is part of neither other."""
    topics = list(pydoc_data.topics.topics.values())
    held_out = topics[::6]
    private = [text for i, text in enumerate(topics) if i % 6]
    texts = {"public": docstrings(600_000), "private": private, "test": held_out}
    paths = tuple(folder / f"{name}.txt" for name in texts)
    for path, pieces in zip(paths, texts.values(), strict=True):
        path.write_text("\n\n".join(pieces), encoding="utf-8")
    return paths[0], paths[1], paths[2]


def docstrings(most_characters: int) -> list[str]:
    """Long docstrings of the standard library's modules, each of them once."""
    found: dict[str, None] = {}
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 200 and text not in found and size < most_characters:
                    found[text] = None
                    size += len(text)
    return list(found)

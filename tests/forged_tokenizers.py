"""Bottom packages whose hashes are right and whose tokenizer is another than the vendor's own."""

import json

from blindtune.exchange.packages.package import open_package
from blindtune.exchange.packages.writing import write_package
from blindtune.models.tokenizers import FILE_NAMES, SETTINGS_NAME, TOKENIZER_NAME


def forge_tokenizer(package, out, change=lambda _tokenizer: None, **settings):
    """A copy of a bottom package, its tokenizer.json changed in place and its settings updated."""
    opened = open_package(package, "bottom")
    tensors = opened.read_tensors({n: (f.shape, f.dtype) for n, f in opened.header.items()})
    files = {n: opened.read_file(n) for n in FILE_NAMES if n in opened.manifest.files}
    tokenizer = json.loads(files[TOKENIZER_NAME])
    change(tokenizer)
    files[TOKENIZER_NAME] = json.dumps(tokenizer).encode()
    files[SETTINGS_NAME] = json.dumps(json.loads(files[SETTINGS_NAME]) | settings).encode()
    write_package(out, opened.manifest, tensors, files)
    return out


def around(before, after, texts=1):
    """A change: the tokens put before and behind a text [(token, id)], the text so many times."""
    text = [{"Sequence": {"id": "A", "type_id": 0}}] * texts
    marks = [[{"SpecialToken": {"id": token, "type_id": 0}} for token, _ in side]
             for side in (before, after)]  # fmt: skip
    processor = {
        "type": "TemplateProcessing",
        "single": [*marks[0], *text, *marks[1]],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in (*before, *after)
        },
    }
    return lambda tokenizer: tokenizer.update(post_processor=processor)

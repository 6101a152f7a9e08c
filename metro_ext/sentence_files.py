"""What makes an exported ``MPNetModel`` a model of sentence-transformers: mean, then unit length.

``SentenceTransformer(FOLDER)`` then gives `metro_ext.text_encoder.sentence_vectors`. The format is
the one that every release since 2.0 reads.
"""

import json
from pathlib import Path

from metro_ext.atomic import atomic_write

_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def write_sentence_files(folder: Path, hidden: int, length: int) -> None:
    """``modules.json`` and the configurations of its modules, beside the model's own files.

    Args:
        hidden: width of the encoder.
        length: the most tokens of a text; more are cut.
    """
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(_MODULES)
    ]
    pooling = {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True}
    pooling |= {f"pooling_mode_{other}": False for other in ("cls_token", "max_tokens")}
    documents = {
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        "modules.json": modules,  # last: with it the folder is a model of sentence-transformers
    }
    for name, _ in _MODULES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, document in documents.items():
        with atomic_write(folder / name, "w") as file:
            file.write(json.dumps(document, indent=2) + "\n")

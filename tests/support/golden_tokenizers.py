"""Write golden/tokenizers.json: a page of text, tiny SentencePiece models, and what SentencePiece makes of the page.

    python tests/support/golden_tokenizers.py      # needs the sentencepiece package

Models are written as the lists that a GGUF file has: pieces, scores, types.
"""

import io
import json
from pathlib import Path

PAGE = (
    "The house was quiet, and nobody's dog barked; \"Don't you think,\" she said, \"we'll be late?\" I'LL SEE.\n"
    "Multiple   spaces,    and a trailing one \n\n\n  indented\n\ttabbed\t\ttwice\n"
    "def f(x, y=3.14):\n    if x <= 0x1F and y != None:\n        return [i**2 for i in range(10)]  # squares\n\n"
    "for (int i = 0; i < 100; ++i) { total += values[i]; } // 100% $5 `tick` ~/path_to/file.txt\r\n"
    "1 12 123 1234 12345 1234567 3.14159 1,000,000 v2.0.1 2024-11-22 ½ ² Ⅷ ٣٤٥ 一二三\n"
    "Привет, мир! Как дела? Ελληνικά γράμματα. Ünïcödé naïve café déjà-vu, cafe\u0301 A\u030a\n"
    "你好，世界。这是一个测试！ 日本語のテキスト、カタカナ。 한국어 문장입니다.\n"
    "مرحبا بالعالم، كيف حالك؟ שלום עולם नमस्ते दुनिया สวัสดีชาวโลก\n"
    "🙂 😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ❤️ → ∑ ≤ © ™ “quotes” ‘single’ — dash… nbsp\u00a0here\u3000wide\u200bzero\n"
    "camelCase HTTPServer snake_case ALLCAPS MixedCASEWord iPhone's O'Neil y'all've\n\n\n\n   \n x\n"
)
LINES = ["", " ", "  two first", "one ", "a  b   c    d", "\n\n\n", "\u2581 itself", "<0x0A> <unk> <s>", "\x00\x7f"]
OPTIONS = {
    "llama": {"add_dummy_prefix": True, "vocab_size": 700},
    "gemma": {
        "add_dummy_prefix": False,
        "vocab_size": 640,
        "user_defined_symbols": ["<start_of_turn>", "\n\n", "\n\n\n", "<b>", *("\u2581" * n for n in range(2, 17))],
    },
    "bytes-missing": {"add_dummy_prefix": True, "vocab_size": 400, "byte_fallback": False, "character_coverage": 0.98},
}


def train(**options: object) -> object:
    import sentencepiece as spm

    model = io.BytesIO()
    settings: dict[str, object] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.985,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 0,
        "minloglevel": 2,
    }
    lines = [line for line in PAGE.split("\n") if line.strip()]
    # Mostly English and code, so that other scripts are beyond the coverage and fall back to bytes.
    sentences = lines[:6] * 9 + lines
    spm.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **(settings | options))
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


def main() -> None:
    found = {}
    for name, options in OPTIONS.items():
        model = train(**options)
        size = model.get_piece_size()
        kinds = {3: model.is_control, 2: model.is_unknown, 6: model.is_byte, 5: model.is_unused}
        user = set(options.get("user_defined_symbols", ()))
        types = []
        for i in range(size):
            kind = next((kind for kind, test in kinds.items() if test(i)), 1)
            types.append(4 if model.id_to_piece(i) in user else kind)
        found[name] = {
            "prefix": options["add_dummy_prefix"],
            "pieces": [model.id_to_piece(i) for i in range(size)],
            "scores": [model.get_score(i) for i in range(size)],
            "types": types,
            "page": model.encode(PAGE),
            "lines": [model.encode(line) for line in LINES],
        }
    path = Path(__file__).parents[1] / "models" / "golden" / "tokenizers.json"
    path.write_text(json.dumps({"page": PAGE, "lines": LINES, "sentencepiece": found}) + "\n")


if __name__ == "__main__":
    main()

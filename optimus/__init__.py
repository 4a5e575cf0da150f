"""A notebook course that builds a modern language model, and the small library it becomes.

Modules:

- `optimus.attention`: Let every position read a weighted mean of the positions before it.
- `optimus.bench`: Let ours and `transformers` take turns on the same weights, and print each figure beside what the machine allows.
- `optimus.build`: Write a layer in a file of your own, have it judged in one sentence, and the course's model runs on it.
- `optimus.cache`: Remember what each layer made of the past, so that a new token costs the work of one token.
- `optimus.checkpoint`: Write down everything the next step depends on, whole or not at all, and load only what proves to be undamaged.
- `optimus.config`: Write every size down once, refuse what cannot work, and predict cost before anything is built.
- `optimus.corpus`: One function opens every corpus, built in, on your disk or on the hub, and none of them has to fit in memory.
- `optimus.data`: Turn documents into one long row of token ids on disk, and make the batch at a step a pure function of (seed, step).
- `optimus.decoding`: Read each weight once, as fast as memory allows: the same model, prepared for one token at a time.
- `optimus.devices`: Ask the machine what it has, compute in the shortest number type it is fast at, and leave the caller's random numbers alone.
- `optimus.distributed`: Give every rank a share of the batch, let the ranks add up what they must share, and nothing but the speed changes.
- `optimus.exercises.judge`: Reject what is nearly right, and say in one sentence what is wrong with it.
- `optimus.feedforward`: Let one projection of a token decide how much of another projection gets through.
- `optimus.files`: A file is written beside its place, brought to the disk, and only then given its name: a reader finds all of it or none of it.
- `optimus.generation`: Turn a row of logits into one next token, again and again, and show the text as it grows.
- `optimus.interop`: Rename every weight, reorder the rows that RoPE turns, and the same numbers run in another program.
- `optimus.measure`: Predict what a training run costs, run it, and say what share of the machine it really used.
- `optimus.mla`: Cache one small vector per token instead of every head's key and value.
- `optimus.model_card`: The page beside a published model says what was written down about it, and nothing else.
- `optimus.next_token`: A model's probabilities of the next token, before and after every setting, as numbers and as HTML.
- `optimus.norm`: Set every token vector to unit root-mean-square, then learn its scale back.
- `optimus.optimizers`: Scale each weight's step by the history of its gradients, or straighten the whole matrix at once.
- `optimus.panel`: Put a hand on every setting of a model, and see at once what each does to the next token and to the text.
- `optimus.panel_lifetime`: A cell is run again, a kernel is interrupted, Python ends: each time a run must stop and its panel be freed.
- `optimus.panel_style`: Colours that follow JupyterLab's, rows that wrap where the window is narrow, and one button that the browser must run.
- `optimus.panel_view`: Every slider, button and page in its place; nothing happens yet.
- `optimus.pieces`: A piece is a name of the package, a few sentences that must hold, and for each sentence a small experiment.
- `optimus.pieces_attention`: Positions, groups, latents: what must hold is said of small tensors, and each sentence catches one mistake.
- `optimus.pieces_model`: Bookkeeping is judged by what it must not do: advance too early, copy, or change anything when it refuses.
- `optimus.pretrained`: A saved model is two files, sizes and weights, and the weights are used only if their names and shapes fit the sizes.
- `optimus.prompt_loop`: A line is a prompt, a line with a slash is a setting, and nothing that is typed can end the program by accident.
- `optimus.ranks`: Everything that processes must do together goes through one object; with a single process it does nothing.
- `optimus.rope`: Turn each query and key by an angle proportional to its position: their dot product then sees only the distance.
- `optimus.run_inputs`: Choose the tokenizer, the documents and the first weights from the settings, and refuse what does not fit together.
- `optimus.run_log`: Keep every step twice: exact numbers in a file that survives a kill, and TensorBoard for the eyes.
- `optimus.runs`: Find out which run is meant, hold its folder alone, and refuse to go on with what would be another experiment.
- `optimus.steps`: Take the gradient in parts that fit, scale it, clip it, and move the weights only when it is finite.
- `optimus.stopping`: Note the first signal, finish the step and its save, and only then end.
- `optimus.text_files`: Read the documents of any folder one at a time, and say which file and which line cannot be read.
- `optimus.timing`: Repeat the work, keep the fastest run, and print the figure so that nobody mistakes it for a promise.
- `optimus.token_files`: Tokenize a corpus once into two files of ids, whatever its size, and go on where a stopped attempt ended.
- `optimus.tokenizer`: A tokenizer accepts every string, learns its merges from any corpus, and opens again with the same ids.
- `optimus.training`: Take one step well, then arrange everything so that the ten-thousandth is as safe as the first.
- `optimus.transformer`: Every layer reads a stream of vectors and adds a small correction; the last sum predicts the next token."""

from optimus.attention import GroupedQueryAttention
from optimus.cache import KVCache, LatentCache
from optimus.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from optimus.config import ModelConfig, TrainingConfig
from optimus.data import load_corpus, load_tokenizer
from optimus.feedforward import SwiGLU
from optimus.generation import generate, stream
from optimus.interop import from_transformers, to_transformers
from optimus.mla import MultiHeadLatentAttention
from optimus.norm import RMSNorm
from optimus.rope import apply_rope
from optimus.training import train
from optimus.transformer import LanguageModel, MLATransformerBlock, TransformerBlock

__all__ = [
    "CheckpointError", "GroupedQueryAttention", "KVCache", "LanguageModel", "LatentCache", "MLATransformerBlock", "ModelConfig",
    "MultiHeadLatentAttention", "RMSNorm", "SwiGLU", "TrainingConfig", "TransformerBlock", "apply_rope", "from_transformers",
    "generate", "latest_checkpoint", "load_checkpoint", "load_corpus", "load_tokenizer", "save_checkpoint", "stream",
    "to_transformers", "train",
]

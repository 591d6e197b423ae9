"""llama.cpp and lm-eval on what `gpt export` writes; `make interop` installs them and runs this.

Not collected by itself: pytest runs it when it is named.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gptcli.checkpoint import load_model
from gptcli.config.schema import GenerateConfig
from gptcli.interop import Format
from gptcli.interop.export import export
from gptcli.tokenizers import Message, encode_conversation, with_chat_tokens
from gptcli.tokenizers.bpe import train_bpe
from support.draws import ids_drawn

from .exports import LLAMA, TEXT, trained

pytestmark = pytest.mark.slow

SHAPES = {
    "gpt2": (),
    "llama": ("model.norm=rmsnorm", "model.position=rope", "model.mlp=swiglu", "model.bias=false",
              "model.n_kv_head=2"),
    "qwen2": ("model.norm=rmsnorm", "model.position=rope", "model.mlp=swiglu", "model.bias=false",
              "model.qkv_bias=true"),
    "qwen3": ("model.norm=rmsnorm", "model.position=rope", "model.mlp=swiglu", "model.bias=false",
              "model.qk_norm=true", "model.tie_embeddings=false"),
}  # fmt: skip
N_NEW = 50
PROMPT = "The cat sat on a"

LLAMA_CPP = """
import json, sys
from llama_cpp import Llama
path, prompt, n_new = sys.argv[1], sys.argv[2], int(sys.argv[3])
llama = Llama(path, n_ctx=128, n_threads=1, verbose=False, logits_all=False)
ids = llama.tokenize(prompt.encode(), add_bos=False, special=False)
# The network may end its text: the continuation is compared id by id, whatever they are.
new = []
llama.reset()
for token in llama.generate(list(ids), temp=0.0, top_k=1, repeat_penalty=1.0):
    new.append(token)
    if len(new) == n_new:
        break
print(json.dumps({"prompt": ids, "new": new}))
"""

LLAMA_CPP_CHAT = """
import ctypes, json, os, sys
from pathlib import Path
import llama_cpp as lib
folder = Path(lib.__file__).parent / "lib"
if any(folder.glob("libggml-cpu-*.so")):  # a build that finds its kernels when it runs
    ctypes.CDLL(str(folder / "libggml.so")).ggml_backend_load_all_from_path(os.fsencode(folder))
path, rows, n_new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
llama = lib.Llama(path, n_ctx=512, n_threads=1, verbose=False)
model = llama._model.model
vocab = lib.llama_model_get_vocab(model)
turns = [[text.encode() for text in (row["role"], row["content"])] for row in rows]
chat = (lib.llama_chat_message * len(rows))(*(lib.llama_chat_message(*turn) for turn in turns))
buffer = ctypes.create_string_buffer(100_000)
template = lib.llama_model_chat_template(model, None)
size = lib.llama_chat_apply_template(template, chat, len(rows), True, buffer, len(buffer))
ids = llama.tokenize(buffer.raw[:size], add_bos=False, special=True)
new = []
for token in llama.generate(list(ids), temp=0.0, top_k=1, repeat_penalty=1.0):
    new.append(token)
    if len(new) == n_new:
        break
ends = [token for token in range(llama.n_vocab()) if lib.llama_vocab_is_eog(vocab, token)]
done = llama.create_chat_completion(rows, temperature=0.0, max_tokens=n_new)
[choice] = done["choices"]
print(json.dumps({"prompt": ids, "new": new, "ends": ends, "answer": choice["message"]["content"],
                  "reason": choice["finish_reason"], "n": done["usage"]["prompt_tokens"]}))
"""

QUANTIZE = """
import ctypes, json, sys
import llama_cpp
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
names = [name.encode() for name in sys.argv[1:]]
print(json.dumps(llama_cpp.llama_model_quantize(*names, ctypes.byref(settings))))
"""

LM_EVAL = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
tasks = TaskManager(include_path=".", include_defaults=False)
found = lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": sys.argv[1], "dtype": "float32"}, tasks=["mine"],
    task_manager=tasks, device="cpu", batch_size=1, bootstrap_iters=0,
)
print(json.dumps(found["results"]["mine"], default=str))
"""
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: task.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


@pytest.fixture
def model(gpt: Any, corpus: Path) -> Callable[..., Path]:
    """Train a network of a shape until it has something to say; return its checkpoint."""

    def make(*sets: str) -> Path:
        words = [
            "tokenizer.name=bpe", "tokenizer.vocab_size=300", "data.dir=data/words", "name=words",
            "model.n_layer=2", "model.n_head=4", "model.n_embd=64", "model.block_size=128",
            "train.max_steps=150", "train.micro_batch_size=4", "train.eval_every=150",
            "optim.lr=3e-3", "device=cpu", "dtype=float32", f"data.source={corpus}", *sets,
        ]  # fmt: skip
        done = gpt("train", *(part for word in words for part in ("-s", word)))
        assert done.code == 0, done.err
        return Path("runs/words/best.pt")

    return make


def run(code: str, *words: str) -> Any:
    """Run Python code and return the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def greedy(checkpoint: Path, prompt: str) -> tuple[list[int], list[int], float]:
    """Return the prompt's ids, our greedy continuation, and the least lead of a chosen token."""
    trained = load_model(checkpoint, torch.device("cpu"))
    ids = trained.tokenizer.encode(prompt).tolist()
    new: list[int] = []
    lead = float("inf")
    with torch.no_grad():
        for _ in range(N_NEW):
            logits = trained.model(torch.tensor([ids + new])).logits[0, -1]
            best = logits[: trained.tokenizer.vocab_size].topk(2)
            lead = min(lead, float(best.values[0] - best.values[1]))
            new.append(int(best.indices[0]))
    return ids, new, lead


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_llama_cpp_continues_as_we_do(model: Any, gpt: Any, shape: str, dtype: str) -> None:
    checkpoint = model(*SHAPES[shape])
    done = gpt("export", "--to", "gguf", "out.gguf", "--dtype", dtype, "--json")
    assert done.code == 0 and done.json["family"] == shape, done.err
    ids, new, lead = greedy(checkpoint, PROMPT)
    found = run(LLAMA_CPP, "out.gguf", PROMPT, str(N_NEW))
    assert found["prompt"] == ids, "the same tokens for the prompt"
    assert found["new"] == new, f"the closest choice was won by {lead:.4f}"


@pytest.mark.parametrize("shape", [{}, LLAMA], ids=["gpt2", "llama"])
def test_llama_cpp_renders_a_conversation_and_answers_as_we_do(shape: dict[str, Any]) -> None:
    made = trained(with_chat_tokens(train_bpe([TEXT], 400)), block_size=256, **shape)
    export(made, Format.GGUF, Path("out.gguf"))
    said = [Message("system", "Be brief. "), Message("user", "the cat\n\n  sat — 1234"),
            Message("assistant", "don't"), Message("user", "日本語 <tag> on a mat")]  # fmt: skip
    ids = encode_conversation(made.tokenizer, said, reply=True)[0].tolist()
    rows = [{"role": role, "content": content.strip()} for role, content in said]
    found = run(LLAMA_CPP_CHAT, "out.gguf", json.dumps(rows), str(N_NEW))
    assert found["prompt"] == ids and found["n"] == len(ids)
    greedily = GenerateConfig(temperature=0, max_new_tokens=N_NEW)
    new = ids_drawn(made.model, ids, greedily)
    assert len(new) == N_NEW and found["new"] == new
    chat = made.tokenizer.chat
    assert chat is not None and found["ends"] == [made.tokenizer.eot, chat.end]


def test_llama_cpp_ends_an_answer_at_the_end_of_its_turn() -> None:
    tokenizer = with_chat_tokens(train_bpe([TEXT], 300))
    chat = tokenizer.chat
    assert chat is not None
    made = trained(tokenizer, block_size=64, **LLAMA, tie_embeddings=False)
    with torch.no_grad():  # says "cat" and ends, whatever is asked
        for parameter in made.model.parameters():
            parameter.zero_()
        made.model.get_parameter("ln_f.weight").fill_(1)
        said = [int(tokenizer.encode(char)[0]) for char in "\ncat"]
        for at, (token, following) in enumerate(zip(said, [*said[1:], chat.end], strict=True)):
            made.model.wte.weight[token, at] = made.model.lm_head.weight[following, at] = 9.0
    export(made, Format.GGUF, Path("out.gguf"))
    asked = json.dumps([{"role": "user", "content": "Hello"}])
    found = run(LLAMA_CPP_CHAT, "out.gguf", asked, "9")
    assert found["answer"] == "cat" and found["reason"] == "stop"


@pytest.mark.parametrize("shape", SHAPES)
def test_q8_0_is_bit_for_bit_what_llama_cpp_makes_of_float32(
    model: Any, gpt: Any, shape: str
) -> None:
    # Not by its continuation: llama.cpp rounds the activations too.
    model(*SHAPES[shape])
    for dtype in ("float32", "q8_0"):
        assert gpt("export", "--to", "gguf", f"{dtype}.gguf", "--dtype", dtype).code == 0
    assert run(QUANTIZE, "float32.gguf", "theirs.gguf") == 0
    ours, theirs = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(name).tensors}
        for name in ("q8_0.gguf", "theirs.gguf")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        assert np.array_equal(tensor.data, theirs[name].data), name


def test_eval_runs_tasks_through_a_temporary_export(model: Any, gpt: Any) -> None:
    checkpoint = model()
    text = "The cat sat on a mat and the dog ran to a big red barn by the sea."
    Path("task.jsonl").write_text(json.dumps({"text": text}) + "\n")
    Path("mine.yaml").write_text(TASK)
    done = gpt("eval", str(checkpoint), "--tasks", "mine.yaml", "--json")
    assert done.code == 0, done.err
    trained = load_model(checkpoint, torch.device("cpu"))
    ids = [trained.tokenizer.eot, *trained.tokenizer.encode(text).tolist()]
    with torch.no_grad():
        loss = trained.model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])).loss
    measured = done.json["tasks"]["mine"]["bits_per_byte"]
    assert measured == pytest.approx(float(loss) / len(text) / 0.6931471805599453, rel=1e-4)
    shown = gpt("eval", str(checkpoint), "--tasks", "mine.yaml", "--limit", "1")
    assert "bits_per_byte" in shown.out and f"{measured:.4f}" in shown.out
    unknown = gpt("eval", str(checkpoint), "--tasks", "no-such-task")
    assert unknown.code == 2 and "no-such-task" in unknown.err
    assert gpt("eval", str(checkpoint), "--tasks", "absent.yaml").code == 2


def test_lm_eval_loads_a_folder_and_measures_what_we_do(model: Any, gpt: Any) -> None:
    model()
    assert gpt("export", "--to", "hf", "out").code == 0
    text = "The cat sat on a mat and the dog ran to a big red barn by the sea."
    Path("task.jsonl").write_text(json.dumps({"text": text}) + "\n")
    Path("mine.yaml").write_text(TASK)
    found = run(LM_EVAL, str(Path("out").resolve()))
    measured = next(value for key, value in found.items() if key.startswith("bits_per_byte"))
    # lm-eval scores the first token too, after end-of-text; ours is given as one document.
    trained = load_model(Path("runs/words/best.pt"), torch.device("cpu"))
    ids = [trained.tokenizer.eot, *trained.tokenizer.encode(text).tolist()]
    with torch.no_grad():
        loss = trained.model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])).loss
    assert float(measured) == pytest.approx(float(loss) / len(text) / 0.6931471805599453, rel=1e-4)

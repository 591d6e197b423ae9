"""Questions with known answers: how many a model answers, what `gpt eval --questions` says.

A row has `messages`, or one message as `prompt`, and an `answer`: with `choices` the right one, as
text or its number from 0 on; without, the text to say (or a list of texts, any of which will do).
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptcli import atomic
from gptcli.api.evaluate import device_of
from gptcli.checkpoint import TrainedModel
from gptcli.config import Config
from gptcli.data.messages import BadRow, conversation_of
from gptcli.data.packing import PackedRows
from gptcli.device import init_runtime
from gptcli.errors import DataError
from gptcli.evaluation import evaluate
from gptcli.generation import encode_prompt
from gptcli.generation.samples import draw_samples
from gptcli.generation.text import chat_prompt
from gptcli.tokenizers import Message, Tokenizer, encode_conversation


@dataclass(frozen=True)
class Question:
    """A row: what is asked, and the answers that are right."""

    messages: list[Message]
    choices: list[str]  # empty for a question that is answered freely
    answers: list[str]


@dataclass(frozen=True)
class Answers:
    """How a model did.

    A choice is the one whose tokens are likeliest: in sum, which favors short ones, or per token.
    Free answers are greedy, and right if they are an answer but for white space.
    """

    choice_questions: int
    choice_accuracy: float | None  # by the sum of the tokens' log-likelihoods
    choice_accuracy_per_token: float | None
    chance: float | None  # what guessing gives
    free_questions: int
    exact_match: float | None
    ended: float | None  # free answers that end by themselves
    seconds: float


def read_questions(path: Path) -> list[Question]:
    """Read a file of JSON lines.

    Raises:
        DataError: A line is no question, with its number and why.
    """
    try:
        lines = atomic.read_bytes(path).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise DataError(f"{path}: {why}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                questions.append(_question(json.loads(line)))
            except (ValueError, RecursionError) as error:
                why = "not JSON" if isinstance(error, json.JSONDecodeError) else error.args[0]
                raise DataError(
                    f"{path}:{number}: {why}", "see docs/chat.md for the form"
                ) from error
    if not questions:
        raise DataError(f"{path}: no questions")
    return questions


def _question(row: Any) -> Question:
    if not isinstance(row, dict):
        raise ValueError("not an object")
    choices: Any = row.get("choices") or []
    answer: Any = row.get("answer")
    are_texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if not are_texts or len(choices) == 1:
        raise ValueError("choices: expected a list of two texts or more")
    if choices and type(answer) is int and 0 <= answer < len(choices):
        answer = choices[answer]
    answers: list[Any] = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(each, str) and each.strip() for each in answers):
        raise ValueError("answer: expected a text, or the number of a choice from 0 on")
    if choices and not set(answers) <= set(choices):
        raise ValueError(f"answer: {answers[0][:60]!r} is not one of the choices")
    said = row.get("messages") or [{"role": "user", "content": row.get("prompt")}]
    asked = [*said, {"role": "assistant", "content": answers[0]}] if isinstance(said, list) else []
    turns = conversation_of({"messages": asked}, "messages")
    if isinstance(turns, BadRow):
        raise ValueError(f"needs messages, or a prompt: {turns.reason}, {turns.detail}")
    return Question([Message(*turn) for turn in turns[:-1]], choices, answers)


def ask(
    trained: TrainedModel,
    questions: Sequence[Question],
    config: Config,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Ask a model all questions; a base model continues the prompt.

    Raises:
        DataError: A question with its answers is longer than the context.
    """
    began = time.perf_counter()
    with_choices = [question for question in questions if question.choices]
    free = [question for question in questions if not question.choices]
    in_sum, per_token = _choose(trained, with_choices, config)
    n_right = n_ended = 0
    for done, question in enumerate(free, 1):
        text, is_ended = _say(trained, question.messages, config)
        n_right += " ".join(text.split()) in {" ".join(each.split()) for each in question.answers}
        n_ended += is_ended
        on_progress(done, len(free))
    chance = [len(set(each.answers)) / len(each.choices) for each in with_choices]
    return Answers(
        len(with_choices), _mean(in_sum), _mean(per_token), _mean(chance),
        len(free), n_right / len(free) if free else None, n_ended / len(free) if free else None,
        time.perf_counter() - began,
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _choose(
    trained: TrainedModel, questions: Sequence[Question], config: Config
) -> tuple[list[bool], list[bool]]:
    """Return for each question whether the likeliest choice is right, in sum and per token."""
    if not questions:
        return [], []
    tokenizer, context = trained.tokenizer, trained.model.config.block_size
    said = [
        _encode(tokenizer, each.messages, choice) for each in questions for choice in each.choices
    ]
    lengths = np.array([len(tokens) for tokens, _ in said])
    if (longest := int(lengths.max())) > context:
        raise DataError(f"a question takes {longest} tokens, the model's context is {context}")
    runtime = init_runtime(config.model_copy(update={"device": device_of(trained)}))
    rows = PackedRows(lengths, said.__getitem__, context, seed=0)
    found = evaluate(trained.model, rows, runtime, context=context, n_spans=len(said))
    assert found is not None
    right: tuple[list[bool], list[bool]] = [], []
    first = 0
    for question in questions:
        part = slice(first, first := first + len(question.choices))
        nats, n_tokens = found.paired.nats[part], found.paired.tokens[part]
        for results, losses in zip(right, (nats, nats / n_tokens), strict=True):
            results.append(question.choices[int(losses.argmin())] in question.answers)
    return right


def _encode(
    tokenizer: Tokenizer, messages: Sequence[Message], choice: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return a question with a choice, and which tokens are the choice's, without its end."""
    if tokenizer.chat is not None:
        tokens, trained = encode_conversation(tokenizer, [*messages, Message("assistant", choice)])
        trained[: len(encode_conversation(tokenizer, messages)[0])] = False
        trained[np.flatnonzero(trained)[-1]] = False
        return tokens, trained
    prompt = tokenizer.encode("\n".join(message.content for message in messages))
    tokens = np.concatenate((prompt, tokenizer.encode(f" {choice.strip()}")))
    return tokens, np.arange(len(tokens)) >= len(prompt)


def _say(trained: TrainedModel, messages: Sequence[Message], config: Config) -> tuple[str, bool]:
    """Return the greedy answer, and whether it ended by itself."""
    tokenizer, model = trained.tokenizer, trained.model
    context, room = model.config.block_size, config.generate.max_new_tokens
    if tokenizer.chat is not None:
        ids, _, room = chat_prompt(tokenizer, messages, context, room)
    else:
        ids = encode_prompt(tokenizer, "\n".join(each.content for each in messages), context)
    greedy = {"temperature": 0.0, "num_samples": 1, "max_new_tokens": room, "stop": []}
    wanted = config.generate.model_copy(update=greedy)
    drawn = list(draw_samples(model, tokenizer, ids, wanted, seed=config.seed, numbers=[0]))
    return "".join(piece for _, piece in drawn), drawn[-1][0].is_ended

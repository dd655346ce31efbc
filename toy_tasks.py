"""The tasks: problems with one right answer each, as tokens.

A task is what the training loop in passn.py sees of the world: a vocabulary, and for training and testing a
matrix of prompts (padded in front, so that every answer starts in the same column) and one of answers (padded
behind). Each builder below makes one; `TASKS` at the end lists them by name.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

PAD, END = 0, 1  # the first two tokens of every vocabulary: filling, and "the answer ends here"
UNKNOWN = 2  # where prompts are made of words: a word that the vocabulary lacks


class Task(NamedTuple):
    name: str
    vocab: list  # vocab[token] is the token's text
    train: tuple  # prompts (P, prompt length) and answers (P, answer length), int64
    test: tuple
    guesses: torch.Tensor | None = None  # where answers can be guessed: how often each is right in training (A,)
    test_guess: torch.Tensor | None = None  # the test answers' places in `guesses` (P,), -1 where not among them


# ----------------------------------------------------------------------------------------------------------
# multiply: 37*58= -> 2146, with no working shown
# ----------------------------------------------------------------------------------------------------------


def multiply(seed=0, num_train=2000, num_test=1000):
    """Products of two two-digit numbers. Every pair of factors is drawn once, in one order, so no test problem is
    a train problem, not even with its factors swapped."""
    vocab = ["<pad>", "<end>", *"0123456789*="]
    pairs = torch.combinations(torch.arange(10, 100), with_replacement=True)  # a <= b: 4,095 of them
    generator = torch.Generator().manual_seed(seed)
    pairs = pairs[torch.randperm(len(pairs), generator=generator)[: num_train + num_test]]
    swap = torch.rand(len(pairs), generator=generator) < 0.5
    pairs[swap] = pairs[swap].flip(1)

    prompts = encode([f"{a}*{b}=" for a, b in pairs.tolist()], vocab)
    answers = encode([f"{a * b:04d}" for a, b in pairs.tolist()], vocab)
    return Task("multiply", vocab, (prompts[:num_train], answers[:num_train]),
                (prompts[num_train:], answers[num_train:]))


# ----------------------------------------------------------------------------------------------------------
# math: the questions of the MATH dataset (Hendrycks et al. 2021, arXiv 2103.03874) that have an integer answer
# ----------------------------------------------------------------------------------------------------------

MAX_QUESTION = 64  # tokens
SUBJECTS = ["algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
            "prealgebra", "precalculus"]


def math(seed=0, math_dir=None):
    """A MATH question -> its integer answer. The split is the dataset's own, so `seed` changes nothing here.

    A word, a LaTeX command, a digit or a sign is a token; a word that the training questions use only once is
    '<unk>'. An answer is its sign and digits and END: at most 5 tokens."""
    problems = {}
    for split in ("train", "test"):
        examples = read_math_dir(math_dir, split) if math_dir else download_math(split)
        problems[split] = [(words(example["problem"]), answer) for example in examples
                           if (answer := integer_answer(example["solution"])) is not None
                           and "[asy]" not in example["problem"]]
        problems[split] = [(question, answer) for question, answer in problems[split]
                           if len(question) <= MAX_QUESTION]
        if not problems[split]:
            raise ValueError(f"the {split} problems have no short question with an integer answer: "
                             f"is this really the MATH dataset?")

    counts = Counter(word for question, _ in problems["train"] for word in question)
    signs = [*"-0123456789"]
    common = sorted(word for word in counts if counts[word] > 1 and word not in signs)
    vocab = ["<pad>", "<end>", "<unk>", *signs, *common]
    known = set(vocab)

    def as_tokens(split):
        questions = [[word if word in known else "<unk>" for word in question] for question, _ in problems[split]]
        questions = [["<pad>"] * (MAX_QUESTION - len(question)) + question for question in questions]
        answers = [[*answer, "<end>"] + ["<pad>"] * (4 - len(answer)) for _, answer in problems[split]]
        return encode(questions, vocab), encode(answers, vocab)

    answer_counts = Counter(answer for _, answer in problems["train"])
    place = {answer: i for i, answer in enumerate(answer_counts)}
    guesses = torch.tensor(list(answer_counts.values()), dtype=torch.float64)
    return Task("math", vocab, as_tokens("train"), as_tokens("test"), guesses / guesses.sum(),
                torch.tensor([place.get(answer, -1) for _, answer in problems["test"]]))


def words(text):
    """'Find $\\frac12x$.' -> ['Find', '$', '\\frac', '1', '2', 'x', '$', '.']"""
    return re.findall(r"\\[A-Za-z]+|[A-Za-z]+|\S", text)


def boxed(solution):
    """What stands in the last \\boxed{...} (or \\fbox{...}, or \\boxed 5) of a solution; None if there is none."""
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])", solution)]
    if not starts:
        return None
    rest = solution[starts[-1]:].lstrip()
    if not rest.startswith("{"):
        return re.match(r"[^\s$.,]*", rest).group()  # without braces: up to the next space or dollar
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i]
    return None


def integer_answer(solution):
    """The final answer as the text of an integer from -999 to 999 ('-5', '0', '12'); None if it is anything else."""
    answer = (boxed(solution) or "").replace("$", "").strip()
    return str(int(answer)) if re.fullmatch(r"-?\d{1,3}", answer) else None


def read_math_dir(directory, split):
    """The examples of a split: from <directory>/<split>.jsonl, or <directory>/<split>/<subject>/<number>.json."""
    lines_file, folder = Path(directory) / f"{split}.jsonl", Path(directory) / split
    def read(file):
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{file}: not UTF-8 text; mend or remove it") from None

    if lines_file.is_file():
        lines = read(lines_file).split("\n")
        texts = {f"{lines_file}, line {i}": line for i, line in enumerate(lines, 1) if line.strip()}
    else:
        files = sorted(folder.glob("*/*.json"), key=lambda file: (file.parent.name, len(file.stem), file.stem))
        texts = {str(file): read(file) for file in files}
    if not texts:
        raise ValueError(f"no MATH problems in {directory}: it needs {split}.jsonl with one object a line, or "
                         f"{split}/<subject>/<number>.json")
    examples = []
    for place, text in texts.items():
        try:
            example = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error}); mend or remove it") from None
        for key in ("problem", "solution"):
            if not isinstance(example, dict) or not isinstance(example.get(key), str):
                raise ValueError(f"{place}: no text under the key '{key}'; each problem needs 'problem' and 'solution'")
        examples.append(example)
    return examples


def download_math(split):
    """The examples of a split, by way of the Hugging Face `datasets` package."""
    either = "pip install datasets, or give --math-dir DIR with train.jsonl and test.jsonl"
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"the math task needs the MATH dataset: {either}") from None
    try:
        return [example for subject in SUBJECTS
                for example in load_dataset("EleutherAI/hendrycks_math", subject, split=split)]
    except Exception as error:  # no network, no such dataset, no disk: the package has errors of many kinds
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"could not download the MATH dataset ({reason}): check the network, or give --math-dir DIR "
                         f"with train.jsonl and test.jsonl") from None


# ----------------------------------------------------------------------------------------------------------


def encode(texts, vocab):
    """Texts (strings, or lists of words) of equal length -> tokens (number of texts, length), int64."""
    token = {text: i for i, text in enumerate(vocab)}
    return torch.tensor([[token[piece] for piece in text] for text in texts])


TASKS = {"multiply": multiply, "math": math}

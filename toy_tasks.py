"""The tasks: problems with one right answer each, as tokens.

A task is what passn.py sees of the world: a vocabulary, and for training and testing a matrix of prompts (padded in
front, so that every answer starts in the same column) and one of answers (padded behind), or a table of proofs. Each
builder below makes one; `TASKS` at the end lists them by name. Of which kind its answers are, and so how they are
trained and measured, is said once, by `kind`: see section 4 of passn.py.
"""

import json
import re
from collections import Counter
from functools import lru_cache
from math import inf, prod
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from tqdm import tqdm

PAD, END = 0, 1  # the first two tokens of every vocabulary: filling, and "the answer ends here"
NO_TOKEN = -100  # the filling where a pretrained model answers, all of whose tokens may be words


class Task(NamedTuple):
    name: str
    kind: str  # of the answers: a name in passn.py's KINDS
    vocab: list  # vocab[token] is the token's text
    length: int  # tokens of a prompt and its answer together
    train: tuple  # prompts (P, prompt length) and answers (P, answer length), int64; of proofs' steps a third, the
    # tokens that can be the answer (P, vocabulary)
    test: tuple  # prompts and answers; of proofs the test theorems' `ProofTable`
    guesses: torch.Tensor | None = None  # where answers can be guessed: how often each is right in training (A,)
    test_guess: torch.Tensor | None = None  # the test answers' places in `guesses` (P,), -1 where not among them
    final: int = 0  # where an answer holds a reasoning trace: its last so many tokens are what counts
    train_table: "ProofTable | None" = None  # of proofs: some training theorems, to measure on
    model: str = ""  # a pretrained model that answers, in its own tokens: then prompts are tuples of any length, and
    # answers are padded with NO_TOKEN


# ----------------------------------------------------------------------------------------------------------
# multiply: 37*58= -> 2146, with no working shown
# ----------------------------------------------------------------------------------------------------------


def multiply(seed=0, num_train=2000, num_test=1000):
    """Products of two two-digit numbers. Every pair of factors is drawn once, in one order, so no test problem is
    a train problem, not even with its factors swapped."""
    vocab = ["<pad>", "<end>", *"0123456789*="]
    pairs, _ = factors(seed, num_train + num_test)
    prompts = encode([f"{a}*{b}=" for a, b in pairs.tolist()], vocab)
    answers = encode([f"{a * b:04d}" for a, b in pairs.tolist()], vocab)
    return Task("multiply", "answers", vocab, 6 + 4, (prompts[:num_train], answers[:num_train]),
                (prompts[num_train:], answers[num_train:]))


def factors(seed, number):
    """`number` random pairs of two-digit numbers (number, 2), no pair twice, not even swapped; and the generator."""
    pairs = torch.combinations(torch.arange(10, 100), with_replacement=True)  # a <= b: 4,095 of them
    generator = torch.Generator().manual_seed(seed)
    pairs = pairs[torch.randperm(len(pairs), generator=generator)[:number]]
    swap = torch.rand(len(pairs), generator=generator) < 0.5
    pairs[swap] = pairs[swap].flip(1)
    return pairs, generator


# ----------------------------------------------------------------------------------------------------------
# cot: 37*58: -> 1850+0296=2146, multiplication with its working (a chain of thought)
# ----------------------------------------------------------------------------------------------------------


def cot(seed=0, num_train=500, num_test=300):
    """The products of `multiply`, each answered by a trace: the two partial products in either order, and their sum.
    Each training problem has one trace, of an order drawn once; right is whatever ends in the right sum."""
    vocab = ["<pad>", "<end>", *"0123456789*:+="]
    pairs, generator = factors(seed, num_train + num_test)
    units_first = (torch.rand(len(pairs), generator=generator) < 0.5).tolist()
    traces = []
    for (a, b), swap in zip(pairs.tolist(), units_first):
        partial = [a * (b - b % 10), a * (b % 10)]
        first, second = partial[::-1] if swap else partial
        traces.append(f"{first:04d}+{second:04d}={a * b:04d}")
    prompts, answers = encode([f"{a}*{b}:" for a, b in pairs.tolist()], vocab), encode(traces, vocab)
    return Task("cot", "traces", vocab, 6 + 14, (prompts[:num_train], answers[:num_train]),
                (prompts[num_train:], answers[num_train:]), final=4)


# ----------------------------------------------------------------------------------------------------------
# prove: theorems of implicational logic, one tactic at a time
#
# A formula is an atom ("a") or an implication, a pair (premise, conclusion). A state of a proof is a pair too: the
# hypotheses, a tuple of formulas numbered from 1, and the goal, a formula. A theorem is the state a proof starts from.
# A tactic is a number: 0 is `intro`, k is `apply k`. Everything goes through `apply_tactic`, the kernel: what it takes
# to the end is proved, whoever chose the tactics.
# ----------------------------------------------------------------------------------------------------------

ATOMS = "abcde"
MAX_DEPTH = 6  # an attempt that has used so many tactics on one branch of the proof gives up
MAX_BLIND = 0.02  # theorems that blind search proves more often are too easy
MAX_PROMPT = 64  # tokens
PROVE_VOCAB = ["<pad>", "<end>", "intro", *map(str, range(1, 9 + len(ATOMS))), *ATOMS, "(", ")", "⊢"]
FIRST_TACTIC = 2  # the token of tactic k is FIRST_TACTIC + k: `intro`, or a hypothesis's number


def apply_tactic(state, tactic):
    """The states that are left to prove after a tactic, () where that ends the proof; None if it does not apply.

    intro: the goal A→B becomes B, with A among the hypotheses. apply k, where hypothesis k is A1→…→An→goal: A1 … An are
    left, under the same hypotheses (n = 0: it is the goal itself)."""
    hypotheses, goal = state
    if tactic == 0:
        if isinstance(goal, str):
            return None
        premise, conclusion = goal
        return ((hypotheses if premise in hypotheses else (*hypotheses, premise), conclusion),)
    if not 1 <= tactic <= len(hypotheses):
        return None
    formula, left = hypotheses[tactic - 1], ()
    while formula != goal:
        if isinstance(formula, str):
            return None
        premise, formula = formula
        left += ((hypotheses, premise),)
    return left


@lru_cache(512)
def tactics(state):
    """{tactic: the states it leaves}, for all tactics that apply."""
    left = {tactic: apply_tactic(state, tactic) for tactic in range(len(state[0]) + 1)}
    return {tactic: states for tactic, states in left.items() if states is not None}


@lru_cache(512)
def prospect(state, depth=MAX_DEPTH):
    """For attempts with at most `depth` tactics on a branch: the number of tactics in the state's shortest proof (inf
    if there is none), the first of them (of several, the lowest), and the probability that blind search, a uniform
    choice among the tactics that apply, proves the state. What a tactic leaves is proved part by part."""
    length, first, blind = inf, None, 0.0
    for tactic, left in tactics(state).items() if depth else ():
        parts = [prospect(part, depth - 1) for part in left]
        blind += prod(part[2] for part in parts) / len(tactics(state))
        if 1 + sum(part[0] for part in parts) < length:
            length, first = 1 + sum(part[0] for part in parts), tactic
    return length, first, blind


def shortest_proof(state, depth=MAX_DEPTH):
    """The steps [(state, tactic), …] of a state's shortest proof, depth first."""
    _, tactic, _ = prospect(state, depth)
    return [(state, tactic)] + [step for part in tactics(state)[tactic] for step in shortest_proof(part, depth - 1)]


def reachable(theorem):
    """The states in which an attempt at the theorem can have to choose a tactic, the theorem first."""
    states, frontier = {}, [theorem]
    for _ in range(MAX_DEPTH):
        frontier = [state for state in dict.fromkeys(frontier) if state not in states and tactics(state)]
        states |= dict.fromkeys(frontier)
        frontier = [part for state in frontier for left in tactics(state).values() for part in left]
    return [*states]


def show(formula):
    """(("a", "b"), ("c", "d")) -> '(a→b)→c→d'"""
    if isinstance(formula, str):
        return formula
    premise, conclusion = formula
    return (premise if isinstance(premise, str) else f"({show(premise)})") + "→" + show(conclusion)


def spell(state):
    """A state as the model reads it: its formulas without arrows, each hypothesis followed by its number (right behind
    the atom that a goal must match), then ⊢ and the goal: ['(', 'a', 'b', ')', 'c', 'd', '1', 'a', '2', '⊢', 'd']"""
    hypotheses, goal = state
    numbered = [[*show(formula).replace("→", ""), str(number)] for number, formula in enumerate(hypotheses, 1)]
    return [*sum(numbered, []), "⊢", *show(goal).replace("→", "")]


class ProofTable(NamedTuple):
    """All that attempts at P theorems can come to: S states, one row each. Tactics are given by their tokens."""
    states: list  # the S states
    prompts: torch.Tensor  # (S, MAX_PROMPT)
    applicable: torch.Tensor  # (S, vocabulary): the tactics that apply
    left: torch.Tensor  # (S, vocabulary, 2): the rows that each of them leaves to prove, or PROVED, or DEAD_END
    theorems: torch.Tensor  # (P,) the theorems' rows
    reach: list  # of each theorem, the rows of all states that attempts at it can come to
    length: torch.Tensor  # (P,) the number of tactics in the shortest proof
    branching: torch.Tensor  # (P,) how many tactics apply along it, on average
    blind: torch.Tensor  # (P,) the probability that one attempt of blind search proves the theorem


PROVED, DEAD_END = -2, -1  # instead of a state's row: nothing is left to prove, or no tactic applies


def proof_p(policy, table, failure=0.0):
    """The probability that an attempt proves each theorem: (P,) float64. policy: (S, vocabulary), the probability of
    each tactic in each state of the table.

    A state is proved if a tactic is chosen all of whose remaining states are proved, each by choices of its own. With d
    tactics left on a branch that is p_d(s) = Σ_t policy(t|s) Π_s' p_(d-1)(s'), and p_0 = `failure` = 0."""
    ends = torch.tensor([1.0, failure], dtype=torch.float64)  # in the places PROVED and DEAD_END
    p = torch.full((len(policy),), failure, dtype=torch.float64)
    for _ in range(MAX_DEPTH):
        p = (policy * torch.cat([p, ends])[table.left].prod(dim=-1)).sum(dim=-1)
    return p[table.theorems]


def part_of(table, numbers):
    """The part of a table that some of its theorems, given by their numbers, need for `proof_p`."""
    rows = torch.tensor(sorted(set().union(*(table.reach[i] for i in numbers))))
    place = torch.full((len(table.prompts) + 2,), DEAD_END)
    place[PROVED], place[rows] = PROVED, torch.arange(len(rows))
    return table._replace(prompts=table.prompts[rows], applicable=table.applicable[rows], left=place[table.left[rows]],
                          theorems=place[table.theorems[[*numbers]]])


def attempt_proof(policy, table, row, generator=None, depth=MAX_DEPTH):
    """One sampled attempt at the state of a row: the steps [(row, tactic's token, depth left), …] if it proves it, else
    None."""
    if depth == 0 or row == DEAD_END:
        return None
    token = torch.multinomial(policy[row], 1, generator=generator).item()
    steps = [(row, token, depth)]
    for part in table.left[row, token].tolist():
        if part != PROVED:
            proof = attempt_proof(policy, table, part, generator, depth - 1)
            if proof is None:
                return None
            steps += proof
    return steps


def show_proof(policy, table):
    """The first theorem that is proved within 64 attempts, and the proof, as text: each line a goal and the tactic used
    on it; what the tactic leaves to prove stands below, indented."""
    generator = torch.Generator().manual_seed(0)
    attempts = ((n, attempt_proof(policy, table, row, generator))
                for row in table.theorems.tolist() for n in range(1, 65))
    n, proof = next(filter(lambda attempt: attempt[1], attempts), (0, None))
    if proof is None:
        return ""
    hypotheses, goal = table.states[proof[0][0]]
    lines = [f"A test theorem, and the proof that attempt {n} found:"]
    lines += [f"  {number}: {show(formula)}" for number, formula in enumerate(hypotheses, 1)] + [f"  ⊢ {show(goal)}"]
    for row, token, depth in proof:
        hypotheses, goal = table.states[row]
        tactic = token - FIRST_TACTIC
        if tactic:
            used = f"apply {tactic}: {show(hypotheses[tactic - 1])}"
        else:
            (assumed, _), = apply_tactic((hypotheses, goal), tactic)
            used = f"intro {assumed.index(goal[0]) + 1}: {show(goal[0])}"
        lines.append(f"{'  ' * (MAX_DEPTH - depth + 2)}{show(goal)}".ljust(28) + used)
    return "\n".join(lines)


def prove(seed=0, num_train=300, num_test=300):
    """Theorems, and of the training ones a shortest proof: an example is a state of it and the tactic used there."""
    train, test = draw_theorems(seed, num_train, num_test)
    return Task("prove", "steps", PROVE_VOCAB, MAX_PROMPT + 1, proof_steps(train), proof_table(test),
                train_table=proof_table(train[:100]))


def search(seed=0, num_train=300, num_test=300):
    """The theorems of `prove`, and no proofs: an example is a theorem, with all that attempts at it can come to."""
    train, test = map(proof_table, draw_theorems(seed, num_train, num_test))
    return Task("search", "searches", PROVE_VOCAB, MAX_PROMPT + 1, train, test,
                train_table=part_of(train, range(min(100, num_train))))


def draw_theorems(seed, num_train, num_test):
    """Theorems (eight random hypotheses and a goal) that can be proved, but hardly by blind search. None is another one
    with its atoms renamed or its hypotheses in another order."""
    random, theorems = Random(seed), {}
    with tqdm(total=num_train + num_test, desc="drawing theorems", leave=False) as bar:
        while len(theorems) < num_train + num_test:
            theorem = random_theorem(random)
            length, _, blind = prospect(theorem)
            if length < inf and blind <= MAX_BLIND and max(len(spell(s)) for s in reachable(theorem)) <= MAX_PROMPT:
                theorems.setdefault(fingerprint(theorem), theorem)
                bar.update(len(theorems) - bar.n)
    return [*theorems.values()][:num_train], [*theorems.values()][num_train:]


def random_theorem(random):
    """Hypotheses and a goal (an atom, or an implication between two), which may or may not follow."""
    def atom():
        return random.choice(ATOMS)

    def formula():  # an atom behind 0 to 2 premises, each an atom or, four times in ten, an implication
        result = atom()
        for _ in range(random.choices([0, 1, 2], [1, 5, 4])[0]):
            result = (atom() if random.random() < 0.6 else (atom(), atom())), result
        return result

    hypotheses = dict.fromkeys(formula() for _ in range(8))  # none twice
    return tuple(hypotheses), atom() if random.random() < 0.6 else (atom(), atom())


def fingerprint(theorem):
    """A text that is the same for theorems that differ only in the atoms' names and the hypotheses' order: each atom's
    name becomes its rank among the descriptions of what stands around the atoms, again and again."""
    hypotheses, goal = theorem
    names = dict.fromkeys(ATOMS, "")

    def renamed(formula, marked=None):
        if isinstance(formula, str):
            return names[formula] + "*" * (formula == marked)
        return f"({renamed(formula[0], marked)}→{renamed(formula[1], marked)})"

    for _ in ATOMS:
        around = {atom: str([sorted(renamed(h, atom) for h in hypotheses), renamed(goal, atom)]) for atom in ATOMS}
        ranks = sorted(set(around.values()))
        names = {atom: str(ranks.index(around[atom])) for atom in ATOMS}
    return str([sorted(map(renamed, hypotheses)), renamed(goal)])


def proof_steps(theorems):
    """The steps of the theorems' shortest proofs: prompts (n, MAX_PROMPT), tactics (n, 1) and the tactics that applied
    (n, vocabulary)."""
    states, chosen = zip(*(step for theorem in theorems for step in dict.fromkeys(shortest_proof(theorem))))
    return read(states), torch.tensor(chosen)[:, None] + FIRST_TACTIC, applicable_tactics(states)


def read(states):
    """The states as prompts, padded in front: (number of states, MAX_PROMPT)."""
    texts = [spell(state) for state in states]
    return encode([["<pad>"] * (MAX_PROMPT - len(text)) + text for text in texts], PROVE_VOCAB)


def applicable_tactics(states):
    """(number of states, vocabulary): true for the tokens of the tactics that apply."""
    applicable = torch.zeros(len(states), len(PROVE_VOCAB), dtype=torch.bool)
    for row, state in zip(applicable, states):
        row[[FIRST_TACTIC + tactic for tactic in tactics(state)]] = True
    return applicable


def proof_table(theorems):
    """The `ProofTable` of some theorems."""
    reach = [reachable(theorem) for theorem in theorems]
    states = [*dict.fromkeys(state for own in reach for state in own)]
    row = {state: i for i, state in enumerate(states)}
    left = torch.full((len(states), len(PROVE_VOCAB), 2), PROVED)
    for state in states:
        for tactic, parts in tactics(state).items():
            for i, part in enumerate(parts):
                left[row[state], FIRST_TACTIC + tactic, i] = row.get(part, DEAD_END)
    proofs = [shortest_proof(theorem) for theorem in theorems]
    branching = [sum(len(tactics(state)) for state, _ in proof) / len(proof) for proof in proofs]
    blind = torch.tensor([prospect(theorem)[2] for theorem in theorems], dtype=torch.float64)
    return ProofTable(states, read(states), applicable_tactics(states), left,
                      torch.tensor([row[theorem] for theorem in theorems]), [[row[s] for s in own] for own in reach],
                      torch.tensor([*map(len, proofs)]), torch.tensor(branching), blind)


# ----------------------------------------------------------------------------------------------------------
# math: the questions of the MATH dataset (Hendrycks et al. 2021, arXiv 2103.03874) that have an integer answer
# ----------------------------------------------------------------------------------------------------------

MAX_QUESTION = 64  # tokens
SUBJECTS = ["algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
            "prealgebra", "precalculus"]


def math_questions(seed=0, math_dir=None, model=None):
    """A MATH question -> its integer answer. The split is the dataset's own, so `seed` changes nothing here.

    A word, a LaTeX command, a digit or a sign is a token; a word that the training questions use only once is
    '<unk>'. An answer is its sign and digits and END: at most 5 tokens. Where a pretrained model is named, the same
    problems are told in its own tokens."""
    problems = {}
    for split in ("train", "test"):
        examples = read_math_dir(math_dir, split) if math_dir else download_math(split)
        problems[split] = [(example["problem"], answer) for example in examples
                           if (answer := integer_answer(example["solution"])) is not None
                           and "[asy]" not in example["problem"] and len(words(example["problem"])) <= MAX_QUESTION]
        if model:
            problems[split].sort(key=lambda problem: len(problem[0]))  # by length, for speed
        if not problems[split]:
            raise ValueError(f"the {split} problems have no short question with an integer answer: "
                             f"is this really the MATH dataset?")
    answer_counts = Counter(answer for _, answer in problems["train"])
    place = {answer: i for i, answer in enumerate(answer_counts)}
    guesses = torch.tensor(list(answer_counts.values()), dtype=torch.float64)
    blind = guesses / guesses.sum(), torch.tensor([place.get(answer, -1) for _, answer in problems["test"]])
    if model:
        return Task("math-lm", "pretrained", [], 0, *in_tokens_of(model, problems), *blind, model=model)

    counts = Counter(word for question, _ in problems["train"] for word in words(question))
    signs = [*"-0123456789"]
    common = sorted(word for word in counts if counts[word] > 1 and word not in signs)
    vocab = ["<pad>", "<end>", "<unk>", *signs, *common]
    known = set(vocab)

    def as_tokens(split):
        questions = [[word if word in known else "<unk>" for word in words(text)] for text, _ in problems[split]]
        questions = [["<pad>"] * (MAX_QUESTION - len(question)) + question for question in questions]
        answers = encode([[*answer, "<end>"] + ["<pad>"] * (4 - len(answer)) for _, answer in problems[split]], vocab)
        return encode(questions, vocab), answers

    return Task("math", "answers", vocab, MAX_QUESTION + 5, as_tokens("train"), as_tokens("test"), *blind)


def in_tokens_of(model, problems):
    """Questions and answers, of the training problems and the test's, as a pretrained model reads them."""
    tokenizer = language_model(model)[1]
    for split in ("train", "test"):
        questions, answers = zip(*problems[split])
        x = tokenizer([f"{question}\nAnswer:" for question in questions])["input_ids"]
        y = tokenizer([f" {answer}" for answer in answers], add_special_tokens=False)["input_ids"]
        width = max(map(len, y))
        y = torch.tensor([row + [tokenizer.eos_token_id] + [NO_TOKEN] * (width - len(row)) for row in y])
        yield tuple(map(tuple, x)), y


@lru_cache(1)
def language_model(name):
    """A pretrained causal language model, built like Llama, and its tokenizer: of a name on the Hugging Face hub, a
    folder, or a .gguf file. In bfloat16 where a processor here is made for it, and so twice as fast; else float32."""
    path, fast = Path(name), getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
    dtype = torch.bfloat16 if fast or torch.cuda.is_available() else torch.float32
    place, file = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
    unpack = {"quantization_config": {"quant_method": "gguf", "dequantize": True}} if file else {}  # to be trained
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(place, **file)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, attn_implementation="eager", **file, **unpack)
        model.model.layers, model.model.rotary_emb, tokenizer.eos_token_id + 0  # what is needed of them
        return model, tokenizer
    except Exception as error:  # no package, no such name, no network, no tokenizer: errors of many kinds
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"--model {name}: {reason} (needed are pip install transformers gguf, and a model built like "
                         f"Llama with its tokenizer: a name on the Hugging Face hub, a folder or a .gguf file)") from None


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


TASKS = {"multiply": multiply, "cot": cot, "prove": prove, "search": search, "math": math_questions}

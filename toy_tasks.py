"""The tasks: problems with one right answer each, as tokens.

A task is what passn.py sees of the world: a vocabulary, and for training and for testing a matrix of prompts (padded in
front, so that every answer starts in the same column) and one of answers (padded at the end), or a table of proofs.
`TASKS`, at the end, lists them. How a task's answers are trained and measured is in section 4 of passn.py.
"""

import hashlib
import json
import re
import sys
from collections import Counter
from functools import lru_cache
from math import inf, prod
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from tqdm import tqdm

PAD, END = 0, 1  # the first two tokens of every vocabulary: padding, and "the answer ends here"


class Task(NamedTuple):
    name: str
    kind: str  # of its answers: a name in passn.py's KINDS
    size: int  # the number of training examples
    vocab: list  # vocab[token] is the token's text
    length: int  # tokens of a prompt and its answer together
    train: tuple  # prompts (P, prompt length) and answers (P, answer length), int64; of theorems a `ProofTable`
    test: tuple  # the same
    answer_length: int = 0  # of a reasoning trace: how many of its last tokens are the answer, which alone counts
    steps: torch.Tensor | None = None  # of known proofs: (n, 3), each step's theorem, row in the table, and tactic
    answer_frequencies: torch.Tensor | None = None  # (A,) where answers can be guessed: how often each is right in training
    test_answer_index: torch.Tensor | None = None  # (P,) the test answers' indices in these, -1 where not among them
    data: str = ""  # which data set the problems are from, where they are not made here
    features: dict = {}  # {name: (P,)} what else is known of the test problems

    def to(self, device):
        """The same task with its prompts and answers on a device. Tables of proofs stay where they are."""
        move = lambda split: split if isinstance(split, ProofTable) else tuple(tensor.to(device) for tensor in split)
        return self._replace(train=move(self.train), test=move(self.test))

    def final(self, answers):
        """What counts of answers (…, answer length)."""
        return answers[..., -self.answer_length or None:]

    def text(self, tokens):
        return "".join(self.vocab[token] for token in tokens if token > END)

    def as_text(self, tries):
        """Tries at the first test problems (P, number, answer length): [(problem, number right, tries as text), …]."""
        result = []
        for prompt, answer, own in zip(*self.test, tries):
            right = self.text(self.final(answer))
            texts = [self.text(self.final(tokens)) or "nothing" for tokens in own]
            result.append((self.text(prompt) + right, texts.count(right), texts))
        return result


def mask_after_end(sampled, end=END, filling=PAD):
    """Sampled tokens (…, A), with filling after the first end token: what follows it is no part of the answer."""
    is_end = sampled == end
    return sampled.masked_fill(is_end.cumsum(dim=-1) - is_end.long() > 0, filling)


# ---- multiply: 37*58= -> 2146, with no working shown -----------------------------------------------------------------


def multiply(seed=0, num_train=2000, num_test=1000):
    """Products of two two-digit numbers. No test problem is a training problem, not even with its factors swapped."""
    vocab = ["<pad>", "<end>", *"0123456789*="]
    pairs, _ = factors(seed, num_train + num_test)
    prompts = encode([f"{a}*{b}=" for a, b in pairs.tolist()], vocab)
    answers = encode([f"{a * b:04d}" for a, b in pairs.tolist()], vocab)
    return Task("multiply", "answers", num_train, vocab, 6 + 4, (prompts[:num_train], answers[:num_train]),
                (prompts[num_train:], answers[num_train:]))


def factors(seed, number):
    """`number` random pairs of two-digit numbers (number, 2), no pair twice, even if swapped; and the generator."""
    pairs = torch.combinations(torch.arange(10, 100), with_replacement=True)  # a <= b: 4,095 of them
    generator = torch.Generator().manual_seed(seed)
    pairs = pairs[torch.randperm(len(pairs), generator=generator)[:number]]
    swap = torch.rand(len(pairs), generator=generator) < 0.5
    pairs[swap] = pairs[swap].flip(1)
    return pairs, generator


# ---- cot: 37*58: -> 1850+0296=2146, multiplication with its working (a chain of thought) -----------------------------


def cot(seed=0, num_train=500, num_test=300):
    """The products of `multiply`, each answered by a trace: the two partial products in either order, and their sum.
    Each training problem has one trace, in an order drawn once; whatever ends in the right sum is right."""
    vocab = ["<pad>", "<end>", *"0123456789*:+="]
    pairs, generator = factors(seed, num_train + num_test)
    units_first = (torch.rand(len(pairs), generator=generator) < 0.5).tolist()
    traces = []
    for (a, b), swap in zip(pairs.tolist(), units_first):
        partial = [a * (b - b % 10), a * (b % 10)]
        first, second = partial[::-1] if swap else partial
        traces.append(f"{first:04d}+{second:04d}={a * b:04d}")
    prompts, answers = encode([f"{a}*{b}:" for a, b in pairs.tolist()], vocab), encode(traces, vocab)
    return Task("cot", "traces", num_train, vocab, 6 + 14, (prompts[:num_train], answers[:num_train]),
                (prompts[num_train:], answers[num_train:]), answer_length=4)


# ---- prove: theorems of implicational logic, one tactic at a time ----------------------------------------------------
#
# A formula is an atom ("a") or an implication, a pair (premise, conclusion). A state of a proof is a pair too: the
# hypotheses, a tuple of formulas numbered from 1, and the goal, a formula. A theorem is the state a proof starts from.
# A tactic is a number: 0 is `intro`, k is `apply k`. Everything goes through `apply_tactic`, the kernel: what it takes
# to the end is proved, whoever chose the tactics.

ATOMS = "abcde"
MAX_DEPTH = 6  # an attempt that has used so many tactics on one branch of the proof gives up
MAX_BLIND = 0.02  # theorems that blind search proves more often are too easy
MAX_PROMPT = 64  # tokens
PROVE_VOCAB = ["<pad>", "<end>", "intro", *map(str, range(1, 9 + len(ATOMS))), *ATOMS, "(", ")", "⊢"]
FIRST_TACTIC = 2  # the token of tactic k is FIRST_TACTIC + k: `intro`, or a hypothesis's number


def apply_tactic(state, tactic):
    """The subgoals that a tactic leaves to prove, () where it ends the proof; None if it does not apply.
    intro: the goal A→B becomes B, with A among the hypotheses. apply k, where hypothesis k is A1→…→An→goal: the subgoals
    are A1 … An, under the same hypotheses (n = 0: it is the goal itself)."""
    hypotheses, goal = state
    if tactic == 0:
        if isinstance(goal, str):
            return None
        premise, conclusion = goal
        return ((hypotheses if premise in hypotheses else (*hypotheses, premise), conclusion),)
    if not 1 <= tactic <= len(hypotheses):
        return None
    formula, subgoals = hypotheses[tactic - 1], ()
    while formula != goal:
        if isinstance(formula, str):
            return None
        premise, formula = formula
        subgoals += ((hypotheses, premise),)
    return subgoals


@lru_cache(512)
def tactics(state):
    """{tactic: the subgoals it leaves}, for all tactics that apply."""
    subgoals = {tactic: apply_tactic(state, tactic) for tactic in range(len(state[0]) + 1)}
    return {tactic: states for tactic, states in subgoals.items() if states is not None}


@lru_cache(512)
def solve(state, depth=MAX_DEPTH):
    """For attempts with at most `depth` tactics on a branch: the number of tactics in the state's shortest proof (inf
    if there is none), the first of them (of several, the lowest), and the probability that blind search, a uniform
    choice among the tactics that apply, proves the state. Each subgoal is proved on its own."""
    length, first, blind = inf, None, 0.0
    for tactic, subgoals in tactics(state).items() if depth else ():
        solved = [solve(subgoal, depth - 1) for subgoal in subgoals]
        blind += prod(chance for _, _, chance in solved) / len(tactics(state))
        steps = 1 + sum(steps for steps, _, _ in solved)
        if steps < length:
            length, first = steps, tactic
    return length, first, blind


def shortest_proof(state, depth=MAX_DEPTH):
    """The steps [(state, tactic), …] of a state's shortest proof, depth first."""
    _, tactic, _ = solve(state, depth)
    proofs = [shortest_proof(subgoal, depth - 1) for subgoal in tactics(state)[tactic]]
    return [(state, tactic)] + sum(proofs, [])


def reachable(theorem):
    """The states in which an attempt at the theorem can have to choose a tactic, the theorem first."""
    states, frontier = {}, [theorem]
    for _ in range(MAX_DEPTH):
        frontier = [state for state in dict.fromkeys(frontier) if state not in states and tactics(state)]
        states |= dict.fromkeys(frontier)
        frontier = [subgoal for state in frontier for subgoals in tactics(state).values() for subgoal in subgoals]
    return [*states]


def pretty(formula):
    """(("a", "b"), ("c", "d")) -> '(a→b)→c→d'"""
    if isinstance(formula, str):
        return formula
    premise, conclusion = formula
    return (premise if isinstance(premise, str) else f"({pretty(premise)})") + "→" + pretty(conclusion)


def state_tokens(state):
    """A state as the model reads it: its formulas without arrows, each hypothesis followed by its number (right behind
    the atom that a goal must match), then ⊢ and the goal: ['(', 'a', 'b', ')', 'c', 'd', '1', 'a', '2', '⊢', 'd']"""
    hypotheses, goal = state
    numbered = [[*pretty(formula).replace("→", ""), str(number)] for number, formula in enumerate(hypotheses, 1)]
    return [*sum(numbered, []), "⊢", *pretty(goal).replace("→", "")]


class ProofTable(NamedTuple):
    """All that attempts at P theorems can come to: S states, one row each. Tactics are given by their tokens."""
    states: list  # the S states
    prompts: torch.Tensor  # (S, MAX_PROMPT)
    applicable: torch.Tensor  # (S, vocabulary): the tactics that apply
    subgoals: torch.Tensor  # (S, vocabulary, 2): the rows that each of them leaves to prove, or PROVED, or DEAD_END
    theorems: torch.Tensor  # (P,) the theorems' rows
    reach: list  # of each theorem, the rows of all states that attempts at it can come to
    length: torch.Tensor  # (P,) the number of tactics in the shortest proof
    branching: torch.Tensor  # (P,) how many tactics apply along it, on average
    blind: torch.Tensor  # (P,) the probability that one attempt of blind search proves the theorem


PROVED, DEAD_END = -2, -1  # instead of a state's row: nothing is left to prove, or no tactic applies


def proof_p(policy, table, failure=0.0):
    """The probability that an attempt proves each theorem: (P,) float64. policy: (S, vocabulary), the probability of
    each tactic in each state of the table. A state is proved if a tactic is chosen all of whose remaining states are
    proved, each by choices of its own. With d tactics left on a branch that is p_d(s) = Σ_t policy(t|s) Π_s' p_(d-1)(s').
    p_0 of a state, and p of a dead end, is `failure`: 0, or 1 to count the attempts that fail, too."""
    ends = torch.tensor([1.0, failure], dtype=torch.float64)  # in the places PROVED and DEAD_END
    p = torch.full((len(policy),), failure, dtype=torch.float64)
    for _ in range(MAX_DEPTH):
        p_of_subgoals = torch.cat([p, ends])[table.subgoals]
        p = (policy * p_of_subgoals.prod(dim=-1)).sum(dim=-1)
    return p[table.theorems]


def part_of(table, theorems):
    """The part of a table that `proof_p` needs for some of its theorems, a tensor of indices."""
    rows = sorted(set().union(*(table.reach[i] for i in theorems.tolist())))
    rows = torch.tensor(rows, dtype=torch.long)
    place = torch.full((len(table.prompts) + 2,), DEAD_END)  # the old rows' new ones
    place[PROVED], place[rows] = PROVED, torch.arange(len(rows))
    return table._replace(prompts=table.prompts[rows], applicable=table.applicable[rows],
                          subgoals=place[table.subgoals[rows]], theorems=place[table.theorems[theorems]])


def sample_attempts(log_policy, table, num_attempts, generator=None):
    """num_attempts sampled attempts at each of the table's P theorems, all at once, one depth after the other.
    Returns which succeed, and each attempt's log-probability, the sum over its choices (differentiable), both
    (P, num_attempts). An attempt stops where it has failed."""
    rows = table.theorems.repeat_interleave(num_attempts)
    attempts = torch.arange(len(rows))  # the attempt that each open state belongs to
    failed = torch.zeros(len(rows), dtype=torch.bool)
    log_pi = torch.zeros(len(rows), dtype=log_policy.dtype)
    for _ in range(MAX_DEPTH):
        if len(rows) == 0:
            break
        tactics = torch.multinomial(log_policy[rows].exp(), 1, generator=generator)[:, 0]
        log_pi = log_pi.index_add(0, attempts, log_policy[rows, tactics])
        subgoals = table.subgoals[rows, tactics]  # (open states, 2)
        is_open = subgoals != PROVED
        rows, attempts = subgoals[is_open], attempts[:, None].expand_as(subgoals)[is_open]
        failed[attempts[rows == DEAD_END]] = True
        rows, attempts = rows[~failed[attempts]], attempts[~failed[attempts]]
    failed[attempts] = True  # still open where no tactics are left
    return ~failed.view(-1, num_attempts), log_pi.view(-1, num_attempts)


def attempt_proof(policy, table, row, generator=None, depth=MAX_DEPTH):
    """One sampled attempt at the state of a row, as text if it proves it, else None. The text is a term: "4(1, intro(2))"
    applies hypothesis 4 and proves its two premises by hypothesis 1 and by intro, then hypothesis 2."""
    if depth == 0 or row == DEAD_END:
        return None
    tactic = torch.multinomial(policy[row], 1, generator=generator).item()
    proofs = []
    for subgoal in table.subgoals[row, tactic].tolist():
        if subgoal != PROVED:
            proof = attempt_proof(policy, table, subgoal, generator, depth - 1)
            if proof is None:
                return None
            proofs.append(proof)
    return PROVE_VOCAB[tactic] + (f"({', '.join(proofs)})" if proofs else "")


def show_attempts(policy, table, num_attempts, generator):
    """Sampled attempts at the first three theorems: [(theorem, number of successes, [proof or "no proof", …]), …]."""
    result = []
    for row in table.theorems[:3].tolist():
        hypotheses, goal = table.states[row]
        proofs = [attempt_proof(policy, table, row, generator) for _ in range(num_attempts)]
        numbered = (f"{number}: {pretty(formula)}  " for number, formula in enumerate(hypotheses, 1))
        theorem = "".join(numbered) + f"⊢ {pretty(goal)}"
        result.append((theorem, num_attempts - proofs.count(None), [proof or "no proof" for proof in proofs]))
    return result


def prove(seed=0, num_train=300, num_test=300):
    """Theorems, and a shortest proof of each training one: an example is a state in it and the tactic used there."""
    task = search(seed, num_train, num_test)
    row = {state: i for i, state in enumerate(task.train.states)}
    steps = [(theorem, row[state], FIRST_TACTIC + tactic) for theorem, start in enumerate(task.train.theorems.tolist())
             for state, tactic in dict.fromkeys(shortest_proof(task.train.states[start]))]
    return task._replace(name="prove", kind="steps", size=len(steps), steps=torch.tensor(steps))


def search(seed=0, num_train=300, num_test=300):
    """The theorems of `prove`, without proofs: an example is a theorem, with all states that attempts at it can reach."""
    train, test = map(proof_table, draw_theorems(seed, num_train, num_test))
    features = {"length": test.length, "branching": test.branching, "blind": test.blind}
    return Task("search", "searches", num_train, PROVE_VOCAB, MAX_PROMPT + 1, train, test, features=features)


def draw_theorems(seed, num_train, num_test):
    """Theorems (eight random hypotheses and a goal) that can be proved, but hardly by blind search."""
    random, theorems = Random(seed), []
    with tqdm(total=num_train + num_test, desc="drawing theorems", leave=False, disable=sys.stderr is None) as bar:
        while len(theorems) < num_train + num_test:
            theorem = random_theorem(random)
            length, _, blind = solve(theorem)
            if length == inf or blind > MAX_BLIND:
                continue
            if max(len(state_tokens(state)) for state in reachable(theorem)) <= MAX_PROMPT:
                theorems.append(theorem)
                bar.update()
    return theorems[:num_train], theorems[num_train:]


def random_theorem(random):
    """Hypotheses and a goal (an atom, or an implication between two), which may or may not follow."""
    atom = lambda: random.choice(ATOMS)

    def formula():  # an atom behind 0 to 2 premises, each an atom or, four times in ten, an implication
        result = atom()
        for _ in range(random.choices([0, 1, 2], [1, 5, 4])[0]):
            result = (atom() if random.random() < 0.6 else (atom(), atom())), result
        return result

    hypotheses = dict.fromkeys(formula() for _ in range(8))  # none twice
    return tuple(hypotheses), atom() if random.random() < 0.6 else (atom(), atom())


def proof_table(theorems):
    """The `ProofTable` of some theorems."""
    reach = [reachable(theorem) for theorem in theorems]
    states = [*dict.fromkeys(state for own in reach for state in own)]
    row = {state: i for i, state in enumerate(states)}
    texts = [state_tokens(state) for state in states]
    prompts = encode([["<pad>"] * (MAX_PROMPT - len(text)) + text for text in texts], PROVE_VOCAB)
    applicable = torch.zeros(len(states), len(PROVE_VOCAB), dtype=torch.bool)
    subgoals = torch.full((len(states), len(PROVE_VOCAB), 2), PROVED)
    for state in states:
        for tactic, left in tactics(state).items():
            place = row[state], FIRST_TACTIC + tactic
            applicable[place] = True
            for i, subgoal in enumerate(left):
                subgoals[*place, i] = row.get(subgoal, DEAD_END)
    proofs = [shortest_proof(theorem) for theorem in theorems]
    branching = [sum(len(tactics(state)) for state, _ in proof) / len(proof) for proof in proofs]
    blind = torch.tensor([solve(theorem)[2] for theorem in theorems], dtype=torch.float64)
    return ProofTable(states, prompts, applicable, subgoals, torch.tensor([row[theorem] for theorem in theorems]),
                      [[row[state] for state in own] for own in reach], torch.tensor([*map(len, proofs)]),
                      torch.tensor(branching), blind)


# ---- math: the questions of the MATH dataset (Hendrycks et al. 2021, arXiv 2103.03874) that have an integer answer ----

MAX_QUESTION = 64  # tokens
SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()


def math_questions(seed=0, math_dir=""):
    """A MATH question -> its integer answer. The split is the dataset's own, so `seed` changes nothing here.
    A word, a LaTeX command, a digit or a sign is a token; a word that the training questions use only once is
    '<unk>'. An answer is its sign and digits and END: at most 5 tokens."""
    problems = {split: math_problems(math_dir, split) for split in ("train", "test")}
    counts = Counter(word for question, _ in problems["train"] for word in words(question))
    signs = [*"-0123456789"]
    common = sorted(word for word in counts if counts[word] > 1 and word not in signs)
    vocab = ["<pad>", "<end>", "<unk>", *signs, *common]
    known = set(vocab)

    def as_tokens(split):
        questions = [[word if word in known else "<unk>" for word in words(text)] for text, _ in problems[split]]
        questions = [["<pad>"] * (MAX_QUESTION - len(question)) + question for question in questions]
        answers = [[*answer, "<end>"] + ["<pad>"] * (4 - len(answer)) for _, answer in problems[split]]
        return encode(questions, vocab), encode(answers, vocab)

    return Task("math", "answers", len(problems["train"]), vocab, MAX_QUESTION + 5, as_tokens("train"), as_tokens("test"),
                **answers_to_guess(problems), data=digest(problems))


def math_problems(math_dir, split):
    """The problems of a split that are used: [(question, answer), …], without pictures, short, with an integer answer."""
    examples = read_math_dir(math_dir, split) if math_dir else download_math(split)
    problems = [(example["problem"], integer_answer(example["solution"])) for example in examples]
    problems = [(question, answer) for question, answer in problems if answer is not None
                and "[asy]" not in question and len(words(question)) <= MAX_QUESTION]
    if not problems:
        raise ValueError(f"the {split} problems have no short question with an integer answer: is this the MATH dataset?")
    return problems


def answers_to_guess(problems):
    """What a guesser knows: the frequencies of the training answers, and where the test answers stand among them."""
    counts = Counter(answer for _, answer in problems["train"])
    index = {answer: i for i, answer in enumerate(counts)}
    frequencies = torch.tensor([*counts.values()], dtype=torch.float64) / len(problems["train"])
    test_index = torch.tensor([index.get(answer, -1) for _, answer in problems["test"]])
    return {"answer_frequencies": frequencies, "test_answer_index": test_index}


def digest(problems):
    """Eight characters that tell one set of problems from another."""
    return hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:8]


def words(text):
    """'Find $\\frac12x$.' -> ['Find', '$', '\\frac', '1', '2', 'x', '$', '.']"""
    return re.findall(r"\\[A-Za-z]+|[A-Za-z]+|\S", text)


def boxed(solution):
    """What stands in the last \\boxed{...} (or \\fbox{...}, or \\boxed 5) of a solution; None if there is none."""
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])", solution)]
    if not starts:
        return None
    rest, depth = solution[starts[-1]:].lstrip(), 0
    if not rest.startswith("{"):
        return re.match(r"[^\s$.,]*", rest).group()  # without braces: up to the next space or dollar
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i]


def integer_answer(solution):
    """The final answer as the text of an integer from -999 to 999 ('-5', '0', '12'); None if it is anything else."""
    answer = (boxed(solution) or "").replace("$", "").strip()
    return str(int(answer)) if re.fullmatch(r"-?\d{1,3}", answer) else None


def read_math_dir(directory, split):
    """The examples of a split: from <directory>/<split>.jsonl, or <directory>/<split>/<subject>/<number>.json."""
    texts, lines_file = {}, Path(directory) / f"{split}.jsonl"
    files = [lines_file] if lines_file.is_file() else (Path(directory) / split).glob("*/*.json")
    for file in sorted(files, key=lambda file: (file.parent.name, len(file.stem), file.stem)):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{file}: not UTF-8 text; fix or remove it") from None
        parts = text.split("\n") if file == lines_file else [text]
        texts |= {f"{file}, line {i}": part for i, part in enumerate(parts, 1) if part.strip()}
    if not texts:
        raise ValueError(f"no MATH problems in {directory}: it needs {split}.jsonl with one object a line, or "
                         f"{split}/<subject>/<number>.json")
    return [parse_example(text, place) for place, text in texts.items()]


def parse_example(text, place):
    try:
        example = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}); fix or remove it") from None
    fields = example if isinstance(example, dict) else {}
    if not all(isinstance(fields.get(key), str) for key in ("problem", "solution")):
        raise ValueError(f"{place}: each problem needs texts under 'problem' and 'solution'; fix or remove it")
    return example


def download_math(split):
    """The examples of a split, by way of the Hugging Face `datasets` package."""
    try:
        from datasets import load_dataset
        return [example for subject in SUBJECTS
                for example in load_dataset("EleutherAI/hendrycks_math", subject, split=split)]
    except Exception as error:  # no package, no network, no disk: errors of many kinds
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"the math task could not download the MATH dataset ({reason}): pip install datasets, or give "
                         "--math-dir DIR with train.jsonl and test.jsonl") from None


def encode(texts, vocab):
    """Texts (strings, or lists of words) of equal length -> tokens (number of texts, length), int64."""
    token = {text: i for i, text in enumerate(vocab)}
    return torch.tensor([[token[piece] for piece in text] for text in texts])

TASKS = {"multiply": multiply, "cot": cot, "prove": prove, "search": search, "math": math_questions}

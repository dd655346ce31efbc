"""The tasks, and what a try is in each of them.

multiply  37*58= -> 2146                 a short answer: its probability p is exact, from one forward pass
math      a question of MATH -> an integer: the same
cot       37*58: -> 1850+0296=2146       working, then the answer, which alone counts: p is estimated from samples
prove     imitate a proof of a theorem, step by step: p of a whole attempt is exact, by dynamic programming
search    the theorems of prove, without proofs: the same p, and training pulls on it directly

Training knows a task by what the class `Task` has. To add one, write a class like `Multiply` and enter
it in `TASKS`; exercises/language_model.py does so from outside.
"""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from functools import lru_cache
from math import inf, prod
from pathlib import Path
from typing import NamedTuple

import torch

PAD, END = 0, 1  # the first two tokens of every vocabulary: padding, and "the answer ends here"


def require(condition, message):
    if not condition:
        raise ValueError(message)


def choose(p):
    """One index for each row of p (…, K), drawn with these probabilities."""
    return (p / torch.empty_like(p).exponential_()).argmax(dim=-1)  # the first of K clocks to ring, at rates p


class Task:
    """Problems with one short right answer each, as tokens: prompts (P, T), padded in front, and answers (P, A), padded
    at the end.

    Of a model it wants `log_p(prompts, answers, temperature)` and `sample(prompts, length, temperature)`; theorems want
    `run` and `share`, for logits. The arguments of a task's class, but for the seed, are settings of its own."""
    settings = {}  # where they differ from the usual ones
    about = {"num_train": "training problems", "num_test": "test problems"}  # what its own settings are
    only_for = {}  # the losses for which a setting does something, where it does not for all
    temperatures = (1.0, 0.7, 1.3, 1.6, 2.0, 2.5)  # at which the test problems are measured
    num_samples = None  # of each test problem, where p is not exact but a share of them
    counts = slice(None)  # the part of an answer that counts
    reinforce = 0  # tries at each problem, where the gradient is estimated from `sample_tries`
    baselines = {}  # {name: p of the test problems}
    num_measured = 500  # of the training examples
    frequencies = None  # {answer: its share in training}, where answers can be guessed; `test_answers` are the right ones
    data = ""  # which data set the problems are from, where they are not made here

    def __init__(self, vocab, train, test):
        self.vocab = vocab  # vocab[token] is the token's text
        self.train, self.test = train, test  # prompts and answers
        self.size = len(train[0])
        self.block_size = train[0].shape[1] + train[1].shape[1]

    def to(self, device):
        self.train, self.test = ([part.to(device) for part in split] for split in (self.train, self.test))
        return self

    def new_model(self, GPT, **shape):
        return GPT(len(self.vocab), self.block_size, **shape)

    def refresh(self, model, epoch):
        """What must be done before an epoch whose loss depends on p, so that `log_p` has the right value. Here nothing."""

    def log_p(self, model, batch):
        """log p of training examples, given by their numbers (B,): (B,), differentiable."""
        prompts, answers = (part[batch] for part in self.train)
        return model.log_p(prompts, answers)

    def measure(self, model):
        """Of the test problems p, (temperatures, P), and the confidence, (P,): the probability of the model's own
        greedy answer, right or wrong."""
        prompts, answers = self.test
        greedy = model.sample(prompts, answers.shape[1], temperature=0)
        p = model.log_p(prompts, answers, self.temperatures).exp()
        return p, model.log_p(prompts, greedy).exp()

    def show_tries(self, model, number):
        """What tries at the first three test problems give: [[problem with its answer, how many are right, tries], …]."""
        prompts, answers = (part[:3] for part in self.test)
        return self.as_text(prompts, answers, sample_many(model, prompts, answers.shape[1], number))

    def as_text(self, prompts, answers, tries):
        shown = []
        for prompt, answer, own in zip(prompts, answers, tries):
            right = self.text(answer[self.counts])
            texts = [self.text(tokens[self.counts]) or "nothing" for tokens in own]
            shown.append([self.text(prompt) + right, texts.count(right), texts])
        return shown

    def text(self, tokens):
        return "".join(self.vocab[token] for token in tokens if token > END)


def sample_many(model, prompts, length, number, temperature=1.0):
    """(P, number, length) tries at each of P prompts."""
    tries = model.sample(prompts.repeat_interleave(number, dim=0), length, temperature)
    return tries.view(len(prompts), number, length)


def with_value(log_p, value):
    """A tensor with log_p's gradient and another value. The value sets the weight that a loss gives; the gradient flows
    through log_p."""
    return value.detach().to(log_p) + log_p - log_p.detach()


def encode(texts, vocab, unknown=None):
    """Texts (strings, or lists of words) of equal length -> tokens (number of texts, length)."""
    token = {text: i for i, text in enumerate(vocab)}
    return torch.tensor([[token.get(piece, unknown) for piece in text] for text in texts])


def padded(pieces, length):
    """A text, or a list of words, padded in front."""
    return ["<pad>"] * (length - len(pieces)) + [*pieces]


# ---- multiply: 37*58= -> 2146, with no working shown -----------------------------------------------------------------


class Multiply(Task):
    """Products of two two-digit numbers. No test problem is a training problem, not even with its factors swapped."""
    settings = {"batch_size": 100, "learning_rate": 2e-3}

    def __init__(self, seed=0, num_train=2000, num_test=1000):
        pairs = factors(seed, num_train, num_test)
        prompts = [f"{a}*{b}=" for a, b in pairs]
        answers = [f"{a * b:04d}" for a, b in pairs]
        vocab = ["<pad>", "<end>", *"0123456789*="]
        super().__init__(vocab, *split(prompts, answers, vocab, num_train))


def factors(seed, num_train, num_test):
    """Random pairs of two-digit numbers, no pair twice, even if swapped."""
    pick = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, a + 1)]
    number = num_train + num_test
    require(number <= len(pairs), f"--num-train and --num-test: there are {len(pairs)} problems in all")
    return [pick.sample(pair, 2) for pair in pick.sample(pairs, number)]


def split(prompts, answers, vocab, num_train):
    """Prompts and answers as tokens: those for training, and those for testing."""
    both = encode(prompts, vocab), encode(answers, vocab)
    return [part[:num_train] for part in both], [part[num_train:] for part in both]


# ---- cot: 37*58: -> 1850+0296=2146, multiplication with its working (a chain of thought) -----------------------------


class Traces(Task):
    """The products of `multiply`, each answered by a trace: the two partial products in either order, and their sum,
    the last four tokens, which alone count. So p sums over all traces, too many to enumerate: in the test, 128 are
    sampled, and pass@N is estimated from those that are right.

    Training knows p(the given trace) exactly, and adds the share of sampled traces that are right and differ from it:
    `num_traces` for each training problem, anew every `resample_every` epochs."""
    settings = {"epochs": 80, "evaluations": 8}
    about = Task.about | {"num_traces": "sampled for each training problem", "resample_every": "so many epochs"}
    only_for = {"num_traces": ["limited", "reward"], "resample_every": ["limited", "reward"]}
    temperatures = 1.0, 1.3
    num_samples = 128
    counts = slice(-4, None)

    def __init__(self, seed=0, num_train=500, num_test=300, num_traces=32, resample_every=2):
        pairs = factors(seed, num_train, num_test)
        pick, traces = random.Random(seed), []
        for a, b in pairs:
            first, second = pick.sample([a * (b - b % 10), a * (b % 10)], 2)
            traces.append(f"{first:04d}+{second:04d}={a * b:04d}")
        vocab = ["<pad>", "<end>", *"0123456789*:+="]
        super().__init__(vocab, *split([f"{a}*{b}:" for a, b in pairs], traces, vocab, num_train))
        self.num_traces, self.resample_every = num_traces, resample_every

    def refresh(self, model, epoch):
        prompts, given = self.train
        if epoch % self.resample_every == 0:
            traces = sample_many(model, prompts, given.shape[1], self.num_traces)
            is_given = (traces == given[:, None]).all(dim=2)
            self.share_of_others = (self.same_answer(traces, given) & ~is_given).float().mean(dim=1)

    def log_p(self, model, batch):
        given, others = super().log_p(model, batch), self.share_of_others[batch]
        p = (given.exp() + others).clamp(max=1)
        return with_value(given, torch.where(others > 0, p.log(), given))

    def measure(self, model):
        prompts, right = self.test
        length = right.shape[1]
        traces = [sample_many(model, prompts, length, self.num_samples, T) for T in self.temperatures]
        p = [self.same_answer(some, right).float().mean(dim=1) for some in traces]
        greedy = model.sample(prompts, length, temperature=0)
        return torch.stack(p), self.same_answer(traces[0], greedy).float().mean(dim=1)

    def same_answer(self, traces, trace):
        """Which of the traces (P, number, A) end in the same answer as one trace (P, A) does: (P, number)."""
        return (traces[..., self.counts] == trace[:, None, self.counts]).all(dim=2)


# ---- prove and search: theorems of implicational logic, one tactic at a time -----------------------------------------
#
# A formula is an atom ("a") or an implication, a pair (premise, conclusion). A state of a proof is a pair too: the
# hypotheses, a tuple of formulas with the names A, B, C …, and the goal, a formula. A theorem is the state a proof
# starts from. A tactic is a letter: "i" for `intro`, or the name of the hypothesis to apply. Everything goes through
# `apply_tactic`, the kernel: what it takes to the end is proved, whoever chose the tactics.

ATOMS, NAMES = "abcde", "ABCDEFGHIJKLM"
TACTICS = "i" + NAMES
PROOF_VOCAB = ["<pad>", "<end>", *TACTICS, *ATOMS, *"()⊢"]
FIRST_TACTIC = PROOF_VOCAB.index("i")
MAX_DEPTH = 6  # an attempt that has used so many tactics on one branch of the proof gives up
MAX_BLIND = 0.02  # theorems that blind search proves more often are too easy
MAX_HYPOTHESES, MAX_GOAL = 61, 3  # tokens


def apply_tactic(state, tactic):
    """The subgoals that a tactic leaves to prove, () where it ends the proof; None if it does not apply.
    i: the goal A→B becomes B, with A among the hypotheses. A hypothesis A1→…→An→goal leaves A1 … An (n = 0: it is the
    goal itself)."""
    hypotheses, goal = state
    if tactic == "i":
        if isinstance(goal, str):
            return None
        premise, conclusion = goal
        return ((hypotheses if premise in hypotheses else (*hypotheses, premise), conclusion),)
    formula, subgoals = hypotheses[NAMES.index(tactic)], ()
    while formula != goal:
        if isinstance(formula, str):
            return None
        premise, formula = formula
        subgoals += ((hypotheses, premise),)
    return subgoals


@lru_cache(512)
def tactics(state):
    """{tactic: the subgoals it leaves}, for all tactics that apply."""
    subgoals = {tactic: apply_tactic(state, tactic) for tactic in TACTICS[:1 + len(state[0])]}
    return {tactic: states for tactic, states in subgoals.items() if states is not None}


@lru_cache(512)
def solve(state, depth=MAX_DEPTH):
    """For attempts with at most `depth` tactics on a branch: the number of tactics in the state's shortest proof (inf
    if there is none), the first of them (of several, the earliest), and the probability that blind search, a uniform
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
    states, new = {}, [theorem]
    for _ in range(MAX_DEPTH):
        new = [state for state in dict.fromkeys(new) if state not in states and tactics(state)]
        states |= dict.fromkeys(new)
        new = [subgoal for state in new for subgoals in tactics(state).values() for subgoal in subgoals]
    return [*states]


def formula_text(formula):
    """(("a", "b"), ("c", "d")) -> '(a→b)→c→d'"""
    if isinstance(formula, str):
        return formula
    premise, conclusion = map(formula_text, formula)
    return f"({premise})→{conclusion}" if "→" in premise else f"{premise}→{conclusion}"


def hypotheses_text(hypotheses):
    """'(a→b)→c A  a B  ': each is followed by its name, right behind the atom that a goal must match."""
    return "".join(f"{formula_text(formula)} {name}  " for formula, name in zip(hypotheses, NAMES))


def as_read(text):
    """A text as the model reads it: without arrows and spaces."""
    return re.sub("[→ ]", "", text)


class Table(NamedTuple):
    """All that attempts at P theorems can come to: S states, a row each. Many states share their hypotheses, which are
    H sets. Tactics are numbers, their places in `TACTICS`."""
    hypotheses: torch.Tensor  # (H, MAX_HYPOTHESES), tokens
    goals: torch.Tensor  # (S, MAX_GOAL), tokens
    under: torch.Tensor  # (S,) the states' sets of hypotheses
    subgoals: torch.Tensor  # (S, tactics, 2): the rows that a tactic leaves to prove, or a mark
    theorems: torch.Tensor  # (P,) the theorems' rows


PROVED, DEAD_END, NO_TACTIC = -1, -2, -3  # marks: nothing is left to prove; no tactic applies; this one does not


def table_of(theorem):
    states = reachable(theorem)
    row = {state: i for i, state in enumerate(states)}
    sets = [*dict.fromkeys(hypotheses for hypotheses, _ in states)]
    under = torch.tensor([sets.index(hypotheses) for hypotheses, _ in states])
    hypotheses = encode([padded(as_read(hypotheses_text(own)), MAX_HYPOTHESES) for own in sets], PROOF_VOCAB)
    goals = encode([padded(as_read("⊢" + formula_text(goal)), MAX_GOAL) for _, goal in states], PROOF_VOCAB)
    subgoals = [[[NO_TACTIC, NO_TACTIC] for _ in TACTICS] for _ in states]
    for state in states:
        for tactic, left in tactics(state).items():
            rows = [row.get(subgoal, DEAD_END) for subgoal in left] + [PROVED, PROVED]
            subgoals[row[state]][TACTICS.index(tactic)] = rows[:2]
    return Table(hypotheses, goals, under, torch.tensor(subgoals), torch.tensor([0]))


def join(tables):
    """Several tables as one."""
    parts, num_sets, num_states = [], 0, 0
    for hypotheses, goals, under, subgoals, theorems in tables:
        subgoals = torch.where(subgoals < 0, subgoals, subgoals + num_states)
        parts.append((hypotheses, goals, under + num_sets, subgoals, theorems + num_states))
        num_sets, num_states = num_sets + len(hypotheses), num_states + len(goals)
    return Table(*map(torch.cat, zip(*parts)))


def proof_p(policy, table, failure=0.0):
    """The probability that an attempt proves each theorem: (P,) float64. policy: (S, tactics), the probability of each
    tactic in each state. A state is proved if a tactic is chosen all of whose subgoals are proved, each by choices of
    its own. With d tactics left on a branch that is p_d(s) = Σ_t policy(t|s) Π_s' p_(d-1)(s'). p_0, and p of a dead
    end, is `failure`: 0, or 1 to count the attempts that fail, too."""
    ends = torch.tensor([0.0, failure, 1.0], dtype=torch.float64)  # in the places of the marks
    p = torch.full((len(policy),), failure, dtype=torch.float64)
    for _ in range(MAX_DEPTH):
        first, second = torch.cat([p, ends])[table.subgoals].unbind(dim=-1)
        p = (policy * first * second).sum(dim=-1)
    return p[table.theorems]


def log_policy(model, table):
    """The tactics' log-probabilities in the states of a table: (S, tactics), float64 on the CPU, -inf where one does
    not apply. Each set of hypotheses is read once, and its keys and values serve all goals under it."""
    device = next(model.parameters()).device
    _, past = model.run(table.hypotheses.to(device), 1)
    logits = []
    parts = (part.to(device).split(1000) for part in (table.under, table.goals))
    for under, goals in zip(*parts):
        own = model.share(past, under, MAX_GOAL)
        logits.append(model.run(goals, 1, own, MAX_HYPOTHESES)[0][:, 0])
    logits = torch.cat(logits)[:, FIRST_TACTIC:FIRST_TACTIC + len(TACTICS)].cpu().double()
    return logits.masked_fill(table.subgoals[..., 0] == NO_TACTIC, -inf).log_softmax(dim=1)


def sample_attempts(log_policy, table, number):
    """`number` attempts at each of a table's P theorems, all at once, one depth after the other; an attempt stops where
    it has failed. Returns which succeed, and their log-probabilities, the sums over their choices (differentiable),
    both (P, number), and the choices: of each depth the tactics, and the places of the choices above them."""
    rows = table.theorems.repeat_interleave(number)
    above = attempts = torch.arange(len(rows))  # the attempt that each open state belongs to
    failed, log_pi = torch.zeros(len(rows), dtype=torch.bool), torch.zeros(len(rows), dtype=torch.float64)
    choices = []
    for _ in range(MAX_DEPTH):
        chosen = choose(log_policy[rows].exp())
        choices.append((chosen.tolist(), above.tolist()))
        log_pi = log_pi.index_add(0, attempts, log_policy[rows, chosen])
        subgoals = table.subgoals[rows, chosen]
        above, side = (subgoals != PROVED).nonzero(as_tuple=True)
        rows, attempts = subgoals[above, side], attempts[above]
        failed[attempts[rows == DEAD_END]] = True
        rows, above, attempts = (part[~failed[attempts]] for part in (rows, above, attempts))
    failed[attempts] = True  # still open where no tactics are left
    return ~failed.view(-1, number), log_pi.view(-1, number), choices


def proof_texts(choices):
    """Attempts as texts: "D(A, i(B))" applies hypothesis D, and proves its two premises by A, and by intro, then B."""
    below = {}  # the texts under each choice
    for tactics, above in reversed(choices):
        texts = defaultdict(list)
        for place, (tactic, parent) in enumerate(zip(tactics, above)):
            parts = ", ".join(below.get(place, ()))
            texts[parent].append(TACTICS[tactic] + f"({parts})" * bool(parts))
        below = texts
    return [text for text, in below.values()]


class Search(Task):
    """Whole attempts at theorems, judged by the kernel; no proof is shown. p, that an attempt succeeds, is exact and
    differentiable. The greedy attempt takes the likeliest tactic in every state; the confidence is the probability of
    all its choices, whether they prove the theorem or not. This is reinforcement learning with a verifier: the reward
    loss with N = 1 is the usual reward. Here its gradient is exact; with `reinforce` it is estimated, from that many
    attempts at each theorem."""
    settings = {"loss": ["reward"], "N": [1, 64], "epochs": 8, "evaluations": 8, "batch_size": 10}
    about = Task.about | {"reinforce": "estimate the gradient from so many attempts; 0: exact"}
    only_for = {"reinforce": ["reward"]}
    num_measured = 100

    def __init__(self, seed=0, num_train=300, num_test=300, reinforce=0):
        train, self.theorems = draw_theorems(seed, num_train, num_test)
        self.train, self.test = [*map(table_of, train)], join(map(table_of, self.theorems))
        self.vocab, self.block_size, self.size = PROOF_VOCAB, MAX_HYPOTHESES + MAX_GOAL, len(train)
        self.baselines = {"blind search": [solve(theorem)[2] for theorem in self.theorems]}
        self.reinforce = reinforce

    def to(self, device):
        return self  # tables stay on the CPU

    def log_p(self, model, batch):
        table = join(self.train[i] for i in batch)
        return proof_p(log_policy(model, table).exp(), table).clamp(min=1e-300).log()

    def sample_tries(self, model, batch):
        """Attempts at training theorems: which succeed, and their log-probabilities, differentiable, (B, reinforce)."""
        table = join(self.train[i] for i in batch)
        return sample_attempts(log_policy(model, table), table, self.reinforce)[:2]

    def measure(self, model):
        log_pi = log_policy(model, self.test)
        policies = [(log_pi / T).softmax(dim=1) for T in self.temperatures]
        greedy = policies[0] * torch.nn.functional.one_hot(log_pi.argmax(dim=1), len(TACTICS))
        p = torch.stack([proof_p(policy, self.test) for policy in policies])
        return p, proof_p(greedy, self.test, failure=1.0)  # also where it fails

    @torch.no_grad()
    def show_tries(self, model, number):
        shown, table = [], join(map(table_of, self.theorems[:3]))
        is_proved, _, choices = sample_attempts(log_policy(model, table), table, number)
        texts = iter(proof_texts(choices))
        for (hypotheses, goal), own in zip(self.theorems, is_proved.tolist()):
            theorem = f"{hypotheses_text(hypotheses)}⊢ {formula_text(goal)}"
            tries = [text if proved else "no proof" for proved, text in zip(own, texts)]
            shown.append([theorem, sum(own), tries])
        return shown


class Steps(Search):
    """Imitation of a known proof of each training theorem, its shortest, step by step: an example is a state of it and
    the tactic used there. F takes the p of an attempt at the whole theorem, by whatever proof, computed anew every
    epoch. With `per_step`, the paper's step-wise loss: p is the step's own, and N counts tries at one step."""
    settings = {"epochs": 40}
    about = Task.about | {"per_step": "p and N are of a step, not of a theorem"}
    only_for = {"per_step": ["limited", "reward"]}
    num_measured = 500

    def __init__(self, seed=0, num_train=300, num_test=300, per_step=False):
        super().__init__(seed, num_train, num_test)
        self.per_step, self.table = per_step, join(self.train)
        steps = []
        for i, theorem in enumerate(draw_theorems(seed, num_train, num_test)[0]):
            row = {state: j for j, state in enumerate(reachable(theorem), self.table.theorems[i])}
            for state, tactic in dict.fromkeys(shortest_proof(theorem)):
                steps.append((i, row[state], TACTICS.index(tactic)))
        self.steps, self.size = torch.tensor(steps), len(steps)

    @torch.no_grad()
    def refresh(self, model, epoch):
        if not self.per_step:
            theorems = torch.arange(len(self.train))
            self.theorem_log_p = torch.cat([Search.log_p(self, model, some) for some in theorems.split(50)])

    def log_p(self, model, batch):
        theorem, row, tactic = self.steps[batch].unbind(dim=1)
        sets, under = self.table.under[row].unique(return_inverse=True)
        states = Table(self.table.hypotheses[sets], self.table.goals[row], under, self.table.subgoals[row], None)
        step = log_policy(model, states)[torch.arange(len(batch)), tactic]
        return step if self.per_step else with_value(step, self.theorem_log_p[theorem])


@lru_cache(2)
def draw_theorems(seed, num_train, num_test):
    """Theorems that can be proved, but hardly by blind search, for training and for testing."""
    pick, theorems = random.Random(seed), []
    while len(theorems) < num_train + num_test:
        theorem = random_theorem(pick)
        if is_hard(theorem):
            longest = max(len(as_read(hypotheses_text(hypotheses))) for hypotheses, _ in reachable(theorem))
            theorems += [theorem] * (longest <= MAX_HYPOTHESES)
    return theorems[:num_train], theorems[num_train:]


def random_theorem(pick):
    """Eight hypotheses and a goal, which may or may not follow."""
    def simple():  # an atom or, four times in ten, an implication between two
        return (pick.choice(ATOMS), pick.choice(ATOMS)) if pick.random() < 0.4 else pick.choice(ATOMS)

    def formula():  # an atom behind 0 to 2 premises
        result = pick.choice(ATOMS)
        for _ in range(pick.choices([0, 1, 2], [1, 5, 4])[0]):
            result = simple(), result
        return result

    return tuple(dict.fromkeys(formula() for _ in range(8))), simple()


def is_hard(theorem):
    """Whether a theorem has a proof, which blind search seldom finds. Most have none, or an easy one: what a truth table
    refutes has none, and what short attempts often prove is easy."""
    hypotheses, goal = theorem
    counterexamples = ~truth(goal)
    for hypothesis in hypotheses:
        counterexamples &= truth(hypothesis)
    return (counterexamples == 0 and all(solve(theorem, depth)[2] <= MAX_BLIND for depth in range(1, MAX_DEPTH + 1))
            and solve(theorem)[0] < inf)


def truth(formula):
    """The worlds in which a formula is true, as the bits of a number: in world w, atom i is true where w has bit i."""
    if isinstance(formula, str):
        return TRUE_IN[formula]
    premise, conclusion = map(truth, formula)
    return ~premise | conclusion


TRUE_IN = {atom: sum(1 << world for world in range(32) if world >> i & 1) for i, atom in enumerate(ATOMS)}


# ---- math: the questions of the MATH dataset (Hendrycks et al. 2021, arXiv 2103.03874) that have an integer answer ----

MAX_QUESTION = 64  # tokens
SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()


class MathQuestions(Task):
    """A MATH question -> its integer answer. The split is the dataset's own, so `seed` changes nothing here.
    A word, a LaTeX command, a digit or a sign is a token; a word that the training questions use only once is
    '<unk>'. An answer is its sign and digits and END: at most 5 tokens."""
    settings = {"epochs": 8, "evaluations": 8, "learning_rate": 2e-3, "n_embd": 128}
    about = {"math_dir": "the folder of the MATH dataset; without it, the datasets package fetches it"}

    def __init__(self, seed=0, math_dir=""):
        problems = self.read(math_dir)
        counts = Counter(word for question, _ in problems["train"] for word in words(question))
        signs = [*"-0123456789"]
        common = {word for word in counts if counts[word] > 1}
        vocab = ["<pad>", "<end>", "<unk>", *signs, *sorted(common - {*signs})]
        tokens = []
        for split in problems.values():
            questions = [padded(words(question), MAX_QUESTION) for question, _ in split]
            answers = [[*answer, "<end>"] + ["<pad>"] * (4 - len(answer)) for _, answer in split]
            tokens.append((encode(questions, vocab, vocab.index("<unk>")), encode(answers, vocab)))
        super().__init__(vocab, *tokens)

    def read(self, math_dir):
        """{split: [(question, answer), …]}. What a guesser knows is kept, and which data set it is, in eight letters."""
        problems = {split: math_problems(math_dir, split) for split in ("train", "test")}
        counts = Counter(answer for _, answer in problems["train"])
        self.frequencies = {answer: count / counts.total() for answer, count in counts.items()}
        self.test_answers = [answer for _, answer in problems["test"]]
        self.data = digest(problems)
        return problems


def math_problems(math_dir, split):
    """The problems of a split that are used: [(question, answer), …], without pictures, short, with an integer answer."""
    examples = read_math(math_dir, split) if math_dir else download_math(split)
    problems = [(example["problem"], integer_answer(example["solution"])) for example in examples]
    problems = [(question, answer) for question, answer in problems
                if answer and "[asy]" not in question and len(words(question)) <= MAX_QUESTION]
    require(problems, f"the {split} problems have no short question with an integer answer: is this the MATH dataset?")
    return problems


def digest(problems):
    """Eight characters that tell one set of problems from another."""
    return hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:8]


def words(text):
    """'Find $\\frac12x$.' -> ['Find', '$', '\\frac', '1', '2', 'x', '$', '.']"""
    return re.findall(r"\\[A-Za-z]+|[A-Za-z]+|\S", text)


def integer_answer(solution):
    """The final answer as the text of an integer from -999 to 999 ('-5', '0', '12'); None if it is anything else. It
    stands in \\boxed{...}, \\fbox{...} or, without braces, between \\boxed and the next dollar. A solution with several
    boxes must have the same in all of them."""
    boxes = re.findall(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{([^}]*)\}|(-?\d[^$\\]*))", solution)
    answers = {(braced or bare).strip(" $\n").rstrip(".") for braced, bare in boxes}
    if len(answers) == 1 and re.fullmatch(r"-?[0-9]{1,3}", answer := answers.pop()):
        return str(int(answer))


def read_math(directory, split):
    """The examples of a split: from <directory>/<split>.jsonl, or <directory>/<split>/<subject>/<number>.json."""
    file, examples = Path(directory, f"{split}.jsonl"), []
    if file.is_file():
        texts = {f"{file}, line {i}": line for i, line in enumerate(file.read_bytes().split(b"\n"), 1) if line.strip()}
    else:
        files = Path(directory, split).glob("*/*.json")
        in_order = sorted(files, key=lambda path: (path.parent.name, len(path.stem), path.stem))
        texts = {path: path.read_bytes() for path in in_order}
    for place, text in texts.items():
        try:
            example = json.loads(text)
            examples.append({key: example[key] + "" for key in ("problem", "solution")})
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"{place}: not an object in UTF-8 JSON with texts under 'problem' and 'solution' ({error}); "
                             "fix or remove it") from None
    require(examples, f"no MATH problems in {directory}: it needs {split}.jsonl with one object a line, or "
                      f"{split}/<subject>/<number>.json")
    return examples


def download_math(split):
    """The examples of a split, by way of the Hugging Face `datasets` package."""
    try:
        from datasets import load_dataset
        return [example for subject in SUBJECTS
                for example in load_dataset("EleutherAI/hendrycks_math", subject, split=split)]
    except Exception as error:  # no package, no network, no disk: errors of many kinds
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"the MATH dataset could not be downloaded ({reason}): pip install datasets, or give "
                         "--math-dir DIR with train.jsonl and test.jsonl") from None


TASKS = {"multiply": Multiply, "cot": Traces, "prove": Steps, "search": Search, "math": MathQuestions}

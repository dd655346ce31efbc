"""The tasks, and what a try is in each of them.

multiply  37*58= -> 2146                 a short answer: its probability p is exact, from one forward pass
finetune  other products, in a model that cross-entropy has trained on multiply: the paper's setting
math      a question of MATH -> an integer: the same
cot       37*58: -> 1850+0296=2146       working, then the answer, which alone counts: p is estimated from samples
prove     imitate a proof of a theorem, step by step: p of a whole attempt is exact, by dynamic programming
search    the theorems of prove, without proofs: the same p, and training pulls on it directly

To add one, write a class like `Multiply` and enter it in `TASKS`; exercises/language_model.py does so from outside."""

import json
import random
import re
from collections import Counter
from functools import lru_cache
from math import inf, prod
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

PAD, END = 0, 1  # the first two tokens of every vocabulary: padding, and "the answer ends here"


def require(condition, message):
    if not condition:
        raise ValueError(message)


def choose(p):
    """One index for each row of p (…, K), drawn with these probabilities."""
    return (p / torch.empty_like(p).exponential_()).argmax(dim=-1)  # the first of K clocks to ring, at rates p


def with_changes(settings, changes):
    """Settings, some of them changed, each to a value of the kind that it has. Raises ValueError where one is not."""
    result = dict(settings)
    for name, value in changes.items():
        usual = settings[name]
        kind = type(usual)
        low = 1 if kind is int and usual else 0
        is_fit = kind is str or isinstance(value, Real) and low <= value <= 1_000_000 and kind(value) == value
        require(is_fit, f"{name} = {value!r}: give {kind.__name__}, a number from {low} to 1,000,000")
        result[name] = kind(value)
    return result


class Task:
    """What training knows of a task. Here: problems with one short right answer each, as tokens: prompts (P, T), padded
    in front, and answers (P, A), padded at the end. Everything that a task gives is on the CPU."""
    axes = {"loss": ["ce", "limited"], "N": [64]}  # that the command line trains with
    settings = {}  # where they differ from the usual ones, and its own; the comment on a line is their help
    paths = []  # settings that name a file or a folder, of which a run keeps no record
    only_for = {"pass_over": ["limited", "root"]}  # the losses for which a setting does something, if not for all
    temperatures = (1.0, 0.7, 1.3, 1.6, 2.0, 2.5)  # at which the test problems are measured
    num_samples = None  # of each test problem, where p is not exact but a share of them
    answer_part = slice(None)  # the part of an answer that counts

    def __init__(self, vocab, train, test):
        self.vocab = vocab  # vocab[token] is the token's text
        self.train, self.test = train, test  # prompts and answers
        self.size = len(train[0])
        self.answers = torch.cat([train[1], test[1]])[:, self.answer_part]  # all, but only what counts
        self.block_size = train[0].shape[1] + train[1].shape[1]

    def own(self, config):
        """This task's settings: as in a run's config, or else as usual."""
        changes = {name: config[name] for name in self.settings if name in config}
        return SimpleNamespace(**with_changes(self.settings, changes))

    def new_model(self, GPT, *shape):
        return GPT(len(self.vocab), self.block_size, *shape)

    def refresh(self, model, epoch):
        """What must be done before an epoch whose loss depends on p, so that `log_p` has its value. Here nothing."""

    def baselines(self, optimal_policy):
        """{name: p of the test problems} of who never reads them, but knows how often each answer is right in training.
        `optimal_policy` knows how best to guess."""
        place = self.answers.unique(dim=0, return_inverse=True)[1].numpy()  # equal answers have the same
        f = np.bincount(place[:self.size], minlength=len(place)) / self.size
        right = place[self.size:]
        return {"guess by frequency": f[right].tolist(),
                "guess best for 64 tries": optimal_policy(f, 64)[right].tolist()}

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
        """What tries at the first three test problems give: [[problem and answer, number of right tries, tries], …]."""
        prompts, answers = (part[:3] for part in self.test)
        return self.as_text(prompts, answers, sample_many(model, prompts, answers.shape[1], number))

    def as_text(self, prompts, answers, tries):
        shown = []
        for prompt, answer, tokens in zip(prompts, answers, tries):
            right = self.text(answer[self.answer_part])
            texts = [self.text(one[self.answer_part]) or "nothing" for one in tokens]
            shown.append([self.text(prompt) + right, texts.count(right), texts])
        return shown

    def text(self, tokens):
        return "".join(self.vocab[token] for token in tokens if token > END)


def sample_many(model, prompts, length, number, temperature=1.0):
    """(P, number, length) tries at each of P prompts. About a thousand at a time, which is faster on a CPU."""
    parts = prompts.split(max(1, 1000 // number))
    tries = torch.cat([model.sample(part, length, temperature, number) for part in parts])
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
    settings = {"batch_size": 100, "learning_rate": 2e-3,
                "num_train": 2000, "num_test": 1000}  # number of problems
    others = 0  # how many problems behind the test problems are left to another task

    def __init__(self, seed=0, **config):
        own = self.own(config)
        pairs = factors(seed, own.num_train, own.num_test, self.others)
        prompts = [f"{a}*{b}=" for a, b in pairs]
        answers = [f"{a * b:04d}" for a, b in pairs]
        vocab = ["<pad>", "<end>", *"0123456789*="]
        super().__init__(vocab, *split(prompts, answers, vocab, own.num_test))


def factors(seed, num_train, num_test, others=0):
    """Random pairs of two-digit numbers, no pair twice, even if swapped: for the test, and for training."""
    pick = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, a + 1)]
    number = num_test + others + num_train
    require(number <= len(pairs), f"--num-train and --num-test: there are {len(pairs) - others} problems in all")
    pairs = [pick.sample(pair, 2) for pair in pick.sample(pairs, len(pairs))]
    return pairs[:num_test] + pairs[num_test + others:number]


def split(prompts, answers, vocab, num_test):
    """Prompts and answers as tokens: those for training, and those for testing, which come first."""
    both = encode(prompts, vocab), encode(answers, vocab)
    return [part[num_test:] for part in both], [part[:num_test] for part in both]


class Finetune(Multiply):
    """The test problems of `multiply`, and other training problems, for a model trained on those of `multiply`."""
    others = Multiply.settings["num_train"]
    settings = Multiply.settings | {"epochs": 60, "learning_rate": 1e-3, "num_train": 1000,
                                    "start": "multiply", "start_epochs": 50}


# ---- cot: 37*58: -> 1850+0296=2146, multiplication with its working (a chain of thought) -----------------------------


class Traces(Task):
    """The products of `multiply`, each answered by a trace: the two partial products in either order, and their sum,
    the last four tokens, which alone count. So p sums over all traces, too many to enumerate: in the test, 128 are
    sampled, and pass@N is estimated from those that are right.

    Training knows p(the given trace) exactly, and adds the share of sampled traces that are right and differ from it:
    `num_traces` for each training problem, anew every second epoch."""
    settings = {"epochs": 80, "evaluations": 8,
                "num_train": 500, "num_test": 300,  # number of problems
                "num_traces": 32}  # sampled of each problem; more than N / 3.6, or a single right one has F < 0.1
    only_for = Task.only_for | {"num_traces": ["limited", "root", "reward"]}
    temperatures = 1.0, 1.3
    num_samples = 128
    answer_part = slice(-4, None)

    def __init__(self, seed=0, **config):
        own = self.own(config)
        pairs = factors(seed, own.num_train, own.num_test)
        pick, traces = random.Random(seed), []
        for a, b in pairs:
            first, second = pick.sample([a * (b - b % 10), a * (b % 10)], 2)
            traces.append(f"{first:04d}+{second:04d}={a * b:04d}")
        vocab = ["<pad>", "<end>", *"0123456789*:+="]
        prompts = [f"{a}*{b}:" for a, b in pairs]
        super().__init__(vocab, *split(prompts, traces, vocab, own.num_test))
        self.num_traces = own.num_traces

    def refresh(self, model, epoch):
        prompts, given = self.train
        if epoch % 2 == 0:
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
        p = [self.same_answer(tries, right).float().mean(dim=1) for tries in traces]
        greedy = model.sample(prompts, length, temperature=0)
        return torch.stack(p), self.same_answer(traces[0], greedy).float().mean(dim=1)

    def same_answer(self, traces, trace):
        """Which of the traces (P, number, A) end in the same answer as one trace (P, A) does: (P, number)."""
        return (traces[..., self.answer_part] == trace[:, None, self.answer_part]).all(dim=2)


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
    """For attempts with at most `depth` tactics on a branch: a state's shortest proof, as its steps [(state, tactic),
    …] depth first, [] if there is none; and the probability that blind search, a uniform choice among the tactics that
    apply, proves the state. Each subgoal is proved on its own."""
    proofs, blind = [], 0.0
    for tactic, subgoals in tactics(state).items() if depth else ():
        solved = [solve(subgoal, depth - 1) for subgoal in subgoals]
        blind += prod(chance for _, chance in solved) / len(tactics(state))
        if all(proof for proof, _ in solved):
            proofs.append(sum((proof for proof, _ in solved), [(state, tactic)]))
    return min(proofs, key=len, default=[]), blind


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


def without_spaces(text):
    """A text as the model reads it: without arrows and spaces."""
    return re.sub("[→ ]", "", text)


class Table(NamedTuple):
    """All that attempts at P theorems can come to: S states, a row each. Many states share their hypotheses, which are
    H sets. Tactics are numbers, their places in `TACTICS`."""
    hypotheses: torch.Tensor  # (H, MAX_HYPOTHESES), tokens
    goals: torch.Tensor  # (S, MAX_GOAL), tokens
    set_of: torch.Tensor  # (S,) the states' sets of hypotheses
    subgoals: torch.Tensor  # (S, tactics, 2): the rows that a tactic leaves to prove, or a mark
    theorems: torch.Tensor  # (P,) the theorems' rows


PROVED, DEAD_END, NO_TACTIC = -1, -2, -3  # marks: nothing is left to prove; no tactic applies; this one does not


def table_of(theorem):
    states = reachable(theorem)
    row = {state: i for i, state in enumerate(states)}
    sets = [*dict.fromkeys(hypotheses for hypotheses, _ in states)]
    set_of = torch.tensor([sets.index(hypotheses) for hypotheses, _ in states])
    texts = [without_spaces(hypotheses_text(hypotheses)) for hypotheses in sets]
    hypotheses = encode([padded(text, MAX_HYPOTHESES) for text in texts], PROOF_VOCAB)
    texts = [without_spaces("⊢" + formula_text(goal)) for _, goal in states]
    goals = encode([padded(text, MAX_GOAL) for text in texts], PROOF_VOCAB)
    subgoals = [[[NO_TACTIC, NO_TACTIC] for _ in TACTICS] for _ in states]
    for state in states:
        for tactic, left in tactics(state).items():
            rows = [row.get(subgoal, DEAD_END) for subgoal in left] + [PROVED, PROVED]
            subgoals[row[state]][TACTICS.index(tactic)] = rows[:2]
    return Table(hypotheses, goals, set_of, torch.tensor(subgoals), torch.tensor([0]))


def join(tables):
    """Several tables as one."""
    parts, num_sets, num_states = [], 0, 0
    for hypotheses, goals, set_of, subgoals, theorems in tables:
        subgoals = torch.where(subgoals < 0, subgoals, subgoals + num_states)
        parts.append((hypotheses, goals, set_of + num_sets, subgoals, theorems + num_states))
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


def log_policy(model, table, rows=slice(None)):
    """The tactics' log-probabilities in some states of a table: (rows, tactics), float64 on the CPU, -inf where one
    does not apply. Each set of hypotheses is read once, and its keys and values serve all goals under it."""
    sets, places = table.set_of[rows].unique(return_inverse=True)
    _, past = model.read(table.hypotheses[sets], 1)
    logits = []
    for place, goals in zip(places.split(1000), table.goals[rows].split(1000)):
        past_of_goals = [keys_values[:, place] for keys_values in past]
        logits.append(model.read(goals, 1, past_of_goals)[0][:, 0])
    logits = torch.cat(logits)[:, FIRST_TACTIC:FIRST_TACTIC + len(TACTICS)].cpu().double()
    return logits.masked_fill(table.subgoals[rows][..., 0] == NO_TACTIC, -inf).log_softmax(dim=1)


def attempt(policy, table, row, depth=MAX_DEPTH):
    """The proof of a state, as a text, that one attempt finds; None if it fails. "D(A, i(B))" applies hypothesis D, and
    proves its two premises by A, and by intro, then B."""
    if depth == 0 or row == DEAD_END:
        return None
    tactic = choose(policy[row]).item()
    subgoals = [subgoal for subgoal in table.subgoals[row, tactic].tolist() if subgoal != PROVED]
    proofs = [attempt(policy, table, subgoal, depth - 1) for subgoal in subgoals]
    if None in proofs:
        return None
    return TACTICS[tactic] + (f"({', '.join(proofs)})" if proofs else "")


class Search(Task):
    """Whole attempts at theorems, judged by the kernel; no proof is shown. This is reinforcement learning with a
    verifier, but p, that an attempt succeeds, is exact and differentiable. The greedy attempt takes the likeliest
    tactic in every state; confidence is the probability of all its choices, whether they prove the theorem or not."""
    axes = {"loss": ["reward"], "N": [1, 64]}
    settings = {"epochs": 8, "evaluations": 8, "batch_size": 10,
                "num_train": 300, "num_test": 300}  # number of theorems

    def __init__(self, seed=0, **config):
        own = self.own(config)
        train, self.theorems = draw_theorems(seed, own.num_train, own.num_test)
        self.train, self.test = [*map(table_of, train)], join(map(table_of, self.theorems))
        self.vocab, self.block_size, self.size = PROOF_VOCAB, MAX_HYPOTHESES + MAX_GOAL, len(train)

    def baselines(self, optimal_policy):
        return {"blind search": [solve(theorem)[1] for theorem in self.theorems]}

    def log_p(self, model, batch):
        table = join(self.train[i] for i in batch)
        return proof_p(log_policy(model, table).exp(), table).clamp(min=1e-300).log()

    def measure(self, model):
        log_pi = log_policy(model, self.test)
        policies = [(log_pi / T).softmax(dim=1) for T in self.temperatures]
        greedy = policies[0] * torch.nn.functional.one_hot(log_pi.argmax(dim=1), len(TACTICS))
        p = torch.stack([proof_p(policy, self.test) for policy in policies])
        return p, proof_p(greedy, self.test, failure=1.0)  # also where it fails

    @torch.no_grad()
    def show_tries(self, model, number):
        shown, table = [], join(map(table_of, self.theorems[:3]))
        policy = log_policy(model, table).exp()
        for (hypotheses, goal), row in zip(self.theorems, table.theorems.tolist()):
            proofs = [attempt(policy, table, row) for _ in range(number)]
            shown.append([f"{hypotheses_text(hypotheses)}⊢ {formula_text(goal)}",
                          number - proofs.count(None), [proof or "no proof" for proof in proofs]])
        return shown


class Steps(Search):
    """Imitation of a known proof of each training theorem, its shortest, step by step: an example is a state of it and
    the tactic used there. F takes the p of an attempt at the whole theorem, by whatever proof, computed anew every
    epoch. With `per_step`, the paper's step-wise loss: p is the step's own, and N counts tries at one step."""
    axes = Task.axes
    settings = {"epochs": 40, "evaluations": 20,
                "num_train": 300, "num_test": 300,  # number of theorems
                "per_step": False}  # p and N are of a step, not of a theorem
    only_for = Task.only_for | {"per_step": ["limited", "root", "reward"]}

    def __init__(self, seed=0, **config):
        super().__init__(seed, **config)
        own = self.own(config)
        self.per_step, self.table = own.per_step, join(self.train)
        steps = []
        for i, theorem in enumerate(draw_theorems(seed, own.num_train, own.num_test)[0]):
            row = {state: j for j, state in enumerate(reachable(theorem), self.table.theorems[i])}
            for state, tactic in dict.fromkeys(solve(theorem)[0]):
                steps.append((i, row[state], TACTICS.index(tactic)))
        self.steps, self.size = torch.tensor(steps), len(steps)

    @torch.no_grad()
    def refresh(self, model, epoch):
        self.theorem_log_p = Search.log_p(self, model, range(len(self.train)))

    def log_p(self, model, batch):
        theorem, row, tactic = self.steps[batch].unbind(dim=1)
        if not (self.per_step or torch.is_grad_enabled()):
            return self.theorem_log_p[theorem]  # which is all that is asked
        step = log_policy(model, self.table, row)[torch.arange(len(batch)), tactic]
        return step if self.per_step else with_value(step, self.theorem_log_p[theorem])


@lru_cache(2)
def draw_theorems(seed, num_train, num_test):
    """Theorems that can be proved, but hardly by blind search, for training and for testing."""
    pick, theorems = random.Random(seed), []
    while len(theorems) < num_train + num_test:
        theorem = random_theorem(pick)
        if is_hard(theorem):
            longest = max(len(without_spaces(hypotheses_text(hypotheses))) for hypotheses, _ in reachable(theorem))
            theorems += [theorem] * (longest <= MAX_HYPOTHESES)
    return theorems[num_test:], theorems[:num_test]


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
    """Whether a theorem has a proof, which blind search seldom finds. Most have none, or an easy one: what a truth
    table refutes has none, and what short attempts often prove is easy."""
    hypotheses, goal = theorem
    counterexamples = ~truth(goal)
    for hypothesis in hypotheses:
        counterexamples &= truth(hypothesis)
    if counterexamples:
        return False
    return (all(solve(theorem, depth)[1] <= MAX_BLIND for depth in range(1, MAX_DEPTH + 1))
            and solve(theorem)[0] != [])


@lru_cache(10_000)
def truth(formula):
    """The worlds in which a formula is true, as the bits of a number: in world w, atom i is true where w has bit i."""
    if isinstance(formula, str):
        return sum(1 << world for world in range(32) if world >> ATOMS.index(formula) & 1)
    premise, conclusion = map(truth, formula)
    return ~premise | conclusion


# ---- math: questions of the MATH dataset (Hendrycks et al. 2021, arXiv 2103.03874) that have an integer answer -------

MAX_QUESTION = 64  # tokens
SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()


class MathQuestions(Task):
    """A MATH question -> its integer answer. The split is the dataset's own, so `seed` changes nothing here.
    A word, a LaTeX command, a digit or a sign is a token; a word that the training questions use only once is
    '<unk>'. An answer is its sign and digits and END: at most 5 tokens."""
    settings = {"epochs": 8, "evaluations": 8, "learning_rate": 2e-3, "n_embd": 128,
                "math_dir": ""}  # the folder of the MATH dataset; without it, the datasets package fetches it
    paths = ["math_dir"]

    def __init__(self, seed=0, **config):
        folder = self.own(config).math_dir
        self.problems = {split: math_problems(folder, split) for split in ("train", "test")}
        counts = Counter(word for question, _ in self.problems["train"] for word in words(question))
        signs = [*"-0123456789"]
        common = {word for word in counts if counts[word] > 1}
        vocab = ["<pad>", "<end>", "<unk>", *signs, *sorted(common - {*signs})]
        tokens = []
        for split in self.problems.values():
            questions = [padded(words(question), MAX_QUESTION) for question, _ in split]
            answers = [[*answer, "<end>"] + ["<pad>"] * (4 - len(answer)) for _, answer in split]
            tokens.append((encode(questions, vocab, vocab.index("<unk>")), encode(answers, vocab)))
        super().__init__(vocab, *tokens)


def math_problems(math_dir, split):
    """The problems of a split that are used: [(question, answer), …], no pictures, short, with an integer answer."""
    examples = read_math(math_dir, split) if math_dir else download_math(split)
    problems = [(example["problem"], integer_answer(example["solution"])) for example in examples]
    problems = [(question, answer) for question, answer in problems
                if answer and "[asy]" not in question and len(words(question)) <= MAX_QUESTION]
    require(problems, f"the {split} problems have no short question with an integer answer: is this the MATH dataset?")
    return problems


def words(text):
    """'Find $\\frac12x$.' -> ['Find', '$', '\\frac', '1', '2', 'x', '$', '.']"""
    return re.findall(r"\\[A-Za-z]+|[A-Za-z]+|\S", text)


def integer_answer(solution):
    """The final answer as the text of an integer from -999 to 999 ('-5', '0', '12'); None if it is anything else. It
    stands in \\boxed{...}, \\fbox{...} or, without braces, between \\boxed and the next dollar. Several boxes must have
    the same in all of them, and in none may the number go on outside, as in -\\boxed{5} and \\boxed{5},000."""
    box = r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{([^}]*)\}|(-?\d[^$\\]*))"
    before = r"(?:[-\d/]\$?|\d,|(?:frac|\}|\^|sqrt)\{)\s*"
    behind = r"(?:\$?[.,]?\d|\{,\}\d|\$?/|\}\{|(?:\\[,;! ]|\s)*(?:\d|i\b|\\(?:pi|sqrt|times|[dt]?frac\d)))"
    if re.search(f"{before}{box}|{box}{behind}", solution):
        return None
    boxes = re.findall(box, solution)
    answers = {(braced or bare).strip(" $\n").rstrip(".") for braced, bare in boxes}
    if len(answers) == 1 and re.fullmatch(r"-?[0-9]{1,3}", answer := answers.pop()):
        return str(int(answer))


def read_math(directory, split):
    """The examples of a split: from <directory>/<split>.jsonl, or <directory>/<split>/<subject>/<number>.json."""
    folder, examples = Path(directory).expanduser(), []
    for path in sorted(folder.glob(f"{split}.jsonl")) or sorted(folder.glob(f"{split}/[!.]*/[!.]*.json")):
        try:
            text = path.read_text(encoding="utf-8")
            for part in text.split("\n") if path.suffix == ".jsonl" else [text]:
                if part.strip():
                    example = json.loads(part)
                    examples.append({key: example[key] + "" for key in ("problem", "solution")})
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path}: no JSON with a problem and a solution ({error!r})") from None
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
        raise ValueError(f"the MATH dataset could not be downloaded ({error!r:.99}): pip install datasets, or give "
                         "--math-dir DIR with train.jsonl and test.jsonl") from None


TASKS = {"multiply": Multiply, "finetune": Finetune, "cot": Traces, "prove": Steps, "search": Search,
         "math": MathQuestions}

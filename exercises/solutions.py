"""The exercises' solutions, one function each. Run them in the folder of passn.py:

    python exercises/solutions.py 3
    python exercises/solutions.py 6 --math-dir DIR

Runs are read from the folder --out, and new ones are saved there. A run that is there is not trained again.
"""

import argparse
import math
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of passn.py

import passn
import toy_tasks
from answers import focal_loss, grpo_loss, hard_stop, maxrl_loss, penalized_log_p, smoothed_log_p
from passn import COLUMNS, dco_loss, estimate_pass_at_n, fail, limited_policy, optimal_policy, pass_at, pass_at_n


THREE = 10, 11, 12  # seeds


def line(label, *cells):
    """Print a line of a table: texts as they are, numbers with three digits."""
    texts = (cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells)
    print(f"{label:40}", *(f"{text:>10}" for text in texts))


def runs_of(args, job):
    """{seed: run} of the runs in the folder that have a job's loss, N and settings, on seeds 10 to 19."""
    found = {}
    for run in sum(passn.load_runs(args.out, job["task"], range(10, 20)), []):
        settings = {"loss": run["loss"], "N": run["N"]} | run["config"]
        if settings.items() <= job.items():
            found[run["seed"]] = run
    return found


def saved(args, *commands):
    """{label: runs} of commands of passn.py, given by their flags: of the seeds from 10 to 19 for which the folder has
    them all."""
    found = []
    for flags in commands:
        for job in passn.parse_arguments(flags.split())[1]:
            found.append(runs_of(args, job))
            if 10 not in found[-1]:
                command = f"python passn.py {flags} --seed 10 --seeds 3 --out {shlex.quote(args.out)}"
                fail(f"{args.out} lacks runs; first run {command.replace('  ', ' ')}")
    seeds = sorted(set.intersection(*map(set, found)))
    return {runs[10]["label"]: [runs[seed] for seed in seeds] for runs in found}


def p_of(run, epoch=-1):
    return run["history"][epoch]["p"][0]  # at temperature 1


def show(args, loss, N=64, task="multiply", seeds=(10,), **changes):
    """Print a line on the runs with these settings, mean over the seeds: from the folder, or else trained now."""
    N = 1 if loss == "ce" else N
    known = runs_of(args, {"task": task, "loss": loss} | passn.configure(task, loss, N=N, **changes))
    rows = []
    for seed in seeds:
        run = known.get(seed) or passn.train(task, loss, N, seed, args.out, **changes)[0]
        end, pass_64 = run["history"][-1], pass_at(run, 64)
        at_end = [pass_at(run, n)[-1, 0] for n in COLUMNS]
        best = pass_64[:, 0].max(), pass_64.max()
        rows.append([*at_end, end["confidence"], end["train_p"], *best, end["updates"]])
    *values, updates = np.mean(rows, axis=0)
    line(run["label"], *values, f"{updates:.0f}")


def header():
    line("", *(f"pass@{n}" for n in COLUMNS), "confidence", "train p", "best@64", "& best T", "updates")


def solution_1(args):
    both = saved(args, "")
    run = both["cross-entropy"][0]
    line("", "pass@1", "pass@64", "confidence")
    for i, record in enumerate(run["history"]):
        line(f"epoch {record['epoch']}", *(pass_at(run, N)[i, 0] for N in (1, 64)), record["confidence"])
    line("", "best@64", "at T", "in epoch", "at the end", "at T")
    for run in sum(both.values(), []):
        pass_64, T = pass_at(run, 64), run["temperatures"]
        epoch, best = np.unravel_index(pass_64.argmax(), pass_64.shape)
        chosen = pass_64.max(), T[best], f"{run['history'][epoch]['epoch']}"
        line(f"{run['label']}, seed {run['seed']}", *chosen, pass_64[-1].max(), T[pass_64[-1].argmax()])


def solution_2(args):
    run, *_ = saved(args, "--loss limited")["limited N=64"]
    p = torch.tensor(p_of(run), dtype=torch.float64)
    line("", "pass@64", "deviation")
    line("exact", pass_at_n(p, 64).mean())
    torch.manual_seed(0)
    for n in (64, 128, 512):
        num_right = torch.distributions.Binomial(n, p).sample([200])  # 200 times n samples of each problem
        unbiased = estimate_pass_at_n(n, num_right, 64).mean(dim=1)
        naive = pass_at_n(num_right / n, 64).mean(dim=1)
        line(f"{n} samples, unbiased", unbiased.mean(), unbiased.std())
        line(f"{n} samples, c/n for p", naive.mean(), naive.std())


def solution_3(args):
    usual = passn.configure("multiply", "ce")["epochs"]
    header()
    for changes in ({}, {"epochs": 2 * usual}, {"n_embd": 32}, {"n_embd": 128}):
        for loss in ("ce", "limited"):
            show(args, loss, **changes)
    for changes in ({"pass_over": 0.0}, {"eps": 1e-8}, {"eps": 1e-8, "pass_over": 0.0}):
        show(args, "limited", **changes)


CORNERS = ("ce", 1), ("limited", 64), ("reward", 1), ("reward", 64)


def solution_4(args):
    in_search = saved(args, "--task search --loss limited reward --N 1 64")
    log_p = torch.tensor([-20.0, -10, -6, -4, -1], requires_grad=True)
    line("log p", *(f"{value:.0f}" for value in log_p))
    for loss, N in CORNERS:
        gradient, = torch.autograd.grad(passn.LOSSES[loss](log_p, N) * len(log_p), log_p)
        line(f"weights by {loss}, N = {N}", *-gradient)
    header()
    for loss, N in CORNERS:
        show(args, loss, N)
    line("search: share of theorems", "untrained", "at the end")
    for label, runs in in_search.items():
        p = np.array([[p_of(run, epoch) for run in runs] for epoch in (0, -1)])
        line(f"with pass@64 below 0.1, {label}", *(pass_at_n(p, 64) < 0.1).double().mean(dim=(1, 2)))


def solution_5(args):
    frontier = "--frontier --n-embd 32 --pass-over 0.01"
    panels = {"multiply, width 32": saved(args, frontier),
              "the same, three times as long": saved(args, f"{frontier} --epochs 300"),
              "search, reward loss": saved(args, "--task search --frontier")}

    def at_end(row, n):
        return passn.stack(row, n)[:, -1, 0]

    for number, (title, runs) in enumerate(panels.items(), 1):
        rows = [*runs.values()]
        line(f"{title}:", *(f"pass@{n}" for n in COLUMNS), "on average", "behind")
        mean = np.array([[at_end(row, 2**i).mean() for i in range(10)] for row in rows])
        for N, values, behind in zip(COLUMNS, mean, mean.max(axis=0) - mean):
            line(f"trained for N = {N}", *values[::3], values.mean(), behind.max())
        for N, row in zip(COLUMNS, rows):
            leads = (at_end(row, N) - at_end(other, N) for other in rows if other is not row)
            words = ("{:.3f} ± {:.3f}".format(*passn.over_seeds(lead)) for lead in leads)
            print(f"N = {N} minus the others at n = {N}: {', '.join(words)}")
        passn.save_figure(passn.draw(rows, 64), Path(args.out, f"frontier-{number}.png"))


@torch.no_grad()
def right_tries(problems, model):
    """Of 64 tries at each test problem the right ones; and the effective number of proofs, where p is exact."""
    if isinstance(problems, toy_tasks.Traces):
        prompts, right = problems.test
        traces = toy_tasks.sample_many(model, prompts, right.shape[1], 64)
        is_right = problems.same_answer(traces, right)
        tries = [traces[i, is_right[i]].tolist() for i in range(len(traces))]
        return tries, torch.tensor(math.nan)
    table = problems.test
    policy = toy_tasks.log_policy(model, table).exp()
    p, of_squares = (toy_tasks.proof_p(policy**power, table) for power in (1, 2))
    tries = [[toy_tasks.attempt(policy, table, row) for _ in range(64)] for row in table.theorems.tolist()]
    return [[proof for proof in proofs if proof] for proofs in tries], p**2 / of_squares


def solution_6(args):
    line("", "pass@64", "proofs", "right", "different")
    untrained = {"epochs": 1, "learning_rate": 0.0}
    rows = [("search", "ce", 1, untrained), *(("search", *corner, {}) for corner in CORNERS)]
    rows += [(task, *corner, {}) for task in ("prove", "cot") for corner in CORNERS[:2]]
    for task, loss, N, changes in rows:
        run, model = passn.train(task, loss, N, seed=10, **changes)
        tries, effective = right_tries(passn.TASKS[task](10), model)
        label = "untrained" if changes else run["label"]
        counts = [len(texts) for texts in tries], [len({*map(str, texts)}) for texts in tries]
        line(f"{task}, {label}", pass_at(run, 64)[-1, 0], effective.nanmean(), *map(np.mean, counts))


def training_answers(task):
    """How often each answer comes in training, the last one never; and for each test problem, which is right."""
    counts = Counter(answer for _, answer in task.problems["train"])
    place = {answer: i for i, answer in enumerate(counts)}
    right = [place.get(answer, -1) for _, answer in task.problems["test"]]
    return np.array([*counts.values(), 0]), right


def solution_7(args):
    counts, right = training_answers(passn.TASKS["math"](math_dir=args.math_dir))
    f = counts / counts.sum()
    line("", *(f"pass@{n}" for n in COLUMNS))
    policies = {"by frequency": lambda f, N: f, "as the limited loss tends": limited_policy, "optimal": optimal_policy}
    for name, policy in policies.items():
        line(name, *(pass_at_n(policy(f, N)[right], N).mean() for N in COLUMNS))
    kept = (np.count_nonzero(optimal_policy(f, N) > 1e-6) for N in COLUMNS)
    line(f"of {len(f) - 1} answers, optimal keeps", *map(str, kept))


def solution_8(args):
    rows = saved(args, "--task prove", "--task prove --loss limited --N 4 --per-step")
    p = {label: np.array([p_of(run) for run in runs]) for label, runs in rows.items()}
    all_fail = np.prod([1 - of_model for of_model in p.values()], axis=0)
    p["ensemble of them all"] = 1 - all_fail ** (1 / len(rows))  # each has its part of the attempts
    runs = rows["cross-entropy"]
    p["blind search"] = np.array([run["baselines"]["blind search"] for run in runs])
    sizes = [(run["seed"], run["config"]["num_train"], run["config"]["num_test"]) for run in runs]
    theorems = [toy_tasks.draw_theorems(*size)[1] for size in sizes]
    steps = [[len(toy_tasks.solve(theorem)[0]) for theorem in of_seed] for of_seed in theorems]
    place = np.digitize(steps, (7, 9, 11))
    line("steps of the shortest proof", "below 7", "7 or 8", "9 or 10", "from 11")
    for name, of_model in p.items():
        line(name, *(pass_at_n(of_model[place == i], 64).mean() for i in range(4)))


class SampledSearch(toy_tasks.Search):
    """`search`, but the gradient of pass@N is estimated from attempts, as in reinforcement learning (REINFORCE)."""
    settings = toy_tasks.Search.settings | {"num_tries": 64}  # attempts at each theorem of a batch, N or more

    def __init__(self, seed=0, N=64, **config):
        super().__init__(seed, **config)
        self.N, self.num_tries = N, self.own(config).num_tries

    def sample_tries(self, model, batch):
        """Attempts at training theorems, all at once, one depth after the other: which succeed, and their
        log-probabilities, differentiable, both (B, num_tries)."""
        table = toy_tasks.join(self.train[i] for i in batch)
        log_policy = toy_tasks.log_policy(model, table)
        rows = table.theorems.repeat_interleave(self.num_tries)
        tries = torch.arange(len(rows))  # the attempt that each open state belongs to
        has_failed, log_pi = torch.zeros(len(rows), dtype=torch.bool), log_policy.new_zeros(len(rows))
        for _ in range(toy_tasks.MAX_DEPTH):
            tactics = toy_tasks.choose(log_policy[rows].exp())
            log_pi = log_pi.index_add(0, tries, log_policy[rows, tactics])
            subgoals = table.subgoals[rows, tactics]
            above, side = (subgoals != toy_tasks.PROVED).nonzero(as_tuple=True)
            rows, tries = subgoals[above, side], tries[above]
            is_dead = rows == toy_tasks.DEAD_END
            has_failed[tries[is_dead]] = True
            rows, tries = rows[~is_dead], tries[~is_dead]
        has_failed[tries] = True  # still open where no tactics are left
        return ~has_failed.view(-1, self.num_tries), log_pi.view(-1, self.num_tries)

    def log_p(self, model, batch):
        """For training, what has the estimate of pass@N's gradient: it is no log p. In measurements, log p, exactly."""
        if not torch.is_grad_enabled():
            return super().log_p(model, batch)
        is_right, log_pi = self.sample_tries(model, batch)
        weights = passn.pass_at_n_weights(self.num_tries, is_right.sum(dim=1), self.N)
        return (weights[:, None] * is_right * log_pi).sum(dim=1)


def solution_9(args):
    passn.TASKS["sampled-search"] = SampledSearch
    passn.LOSSES["sampled"] = lambda log_p, N: -log_p.mean()
    task, theorems = SampledSearch(10, num_train=20, num_test=1), torch.arange(20)
    torch.manual_seed(10)
    model = task.new_model(passn.GPT)

    def gradient(loss):
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, [*model.parameters()])])

    def estimate(seed):
        torch.manual_seed(seed)
        return gradient(passn.LOSSES["sampled"](task.log_p(model, theorems), 64))

    exact = gradient(passn.reward_loss(toy_tasks.Search.log_p(task, model, theorems), 64))
    line("", "cosine", "mean of 6")
    for task.num_tries in (64, 256, 1024):
        estimates = torch.stack([estimate(seed) for seed in range(6)])
        cosines = torch.cosine_similarity(estimates, exact[None])
        line(f"{task.num_tries} attempts", cosines.mean(), torch.cosine_similarity(estimates.mean(dim=0), exact, dim=0))
    header()
    for N in (1, 64):
        show(args, "reward", N, "search")
        show(args, "sampled", N, "sampled-search")


def solution_10(args):
    for gamma in (8, 64, 160):
        passn.LOSSES[f"focal{gamma}"] = lambda log_p, N, gamma=gamma: focal_loss(log_p, gamma)
    for k in (1, 2, 4):
        passn.LOSSES[f"stop{k}"] = lambda log_p, N, k=k: hard_stop(log_p, N, k)
    names = ("focal8", "focal64", "focal160", "stop1", "stop2", "stop4")
    line("factor", "highest", "1/2 at p =")
    for name in ("limited", *names):
        log_p = torch.linspace(-9, -0.01, 10_000, requires_grad=True)
        slope, = torch.autograd.grad(10_000 * passn.LOSSES[name](log_p, 64), log_p)  # the losses are means
        line(name, -slope.min(), log_p[slope < -0.5].max().exp())
    header()
    show(args, "limited")
    show(args, "limited", pass_over=0.0)  # the others, too, pass over nothing
    for name in names:
        show(args, name)


class Smoothed(toy_tasks.Multiply):
    """`multiply` under cross-entropy with label smoothing, or with a confidence penalty: minus the logarithm of each
    token's probability, mixed with the mean over all tokens, or minus the entropy."""
    settings = toy_tasks.Multiply.settings | {
        "smoothing": 0.0,  # share of the mean over all tokens
        "penalty": 0.0,  # on confidence
    }

    def __init__(self, seed=0, **config):
        super().__init__(seed, **config)
        self.how = self.own(config)

    def log_p(self, model, batch):
        prompts, answers = (part[batch] for part in self.train)
        texts = torch.cat([prompts, answers[:, :-1]], dim=1)
        logits = model.read(texts, answers.shape[1])[0].flatten(0, 1).cpu()
        labels = answers.flatten()
        if self.how.penalty:
            log_ps = penalized_log_p(logits, labels, self.how.penalty)
        else:
            log_ps = smoothed_log_p(logits, labels, self.how.smoothing)
        return toy_tasks.with_value(log_ps.view_as(answers).sum(dim=1), super().log_p(model, batch))


def solution_11(args):
    passn.TASKS["smoothed"] = Smoothed
    header()
    for changes in ({}, *({"weight_decay": decay} for decay in (0.3, 1.0, 3.0)), {"n_embd": 32}):
        show(args, "ce", seeds=THREE, **changes)
    for name, strengths in (("smoothing", (0.01, 0.03, 0.1)), ("penalty", (0.1, 0.3, 1.0))):
        for strength in strengths:
            show(args, "ce", task="smoothed", seeds=THREE, **{name: strength})
    for changes in ({}, {"n_embd": 32}):
        show(args, "limited", seeds=THREE, **changes)


def solution_12(args):
    passn.LOSSES["from1"] = lambda log_p, N: dco_loss(log_p, 512 ** torch.rand(len(log_p))).mean()
    passn.LOSSES["from64"] = lambda log_p, N: dco_loss(log_p, 64 * 8 ** torch.rand(len(log_p))).mean()
    header()
    show(args, "ce")
    for N in (8, 64, 512):
        show(args, "limited", N)
    for name in ("from1", "from64"):
        show(args, name)


def solution_13(args):
    passn.LOSSES["maxrl"] = maxrl_loss
    passn.LOSSES["grpo"] = lambda log_p, N: grpo_loss(log_p)
    for task in ("search", "multiply"):
        line(task)
        header()
        for loss, N in (*CORNERS, ("maxrl", 8), ("maxrl", 64), ("grpo", 1)):
            show(args, loss, N, task)


def solution_14(args):
    counts, right = training_answers(passn.TASKS["math"](math_dir=args.math_dir))
    count = counts[right]
    groups = {"all": count >= 0, "0 to 5": count <= 5, "6 to 30": (count > 5) & (count <= 30), "from 31": count > 30}
    groups = {name: group for name, group in groups.items() if group.any()}
    tables = [passn.load_runs(args.out, task, range(10, 20)) for task in ("math", "math-lm")]
    if not any(tables):
        fail(f"{args.out} has no runs on MATH; first run python passn.py --task math --math-dir DIR "
             f"--loss ce limited --N 64 --seed 10 --seeds 3 --out {shlex.quote(args.out)}")
    for run, *_ in sum(tables, []):
        if len(p_of(run)) != len(count):
            fail(f"{args.out} has {run['label']} on {run['task']} with other problems than {args.math_dir}")

    def pass_64(runs, in_best_epoch):  # of each problem, mean over the seeds
        epochs = [pass_at(run, 64)[:, 0].argmax() if in_best_epoch else -1 for run in runs]
        p = [p_of(run, epoch) for run, epoch in zip(runs, epochs)]
        return pass_at_n(p, 64).mean(dim=0).numpy()

    def means(label, values):
        line(label, *(values[group].mean() for group in groups.values()))

    line("answer's count in training", *groups)
    line("test problems", *(f"{group.sum()}" for group in groups.values()))
    for rows in tables:
        best = None
        for runs in rows:  # cross-entropy first
            name, label, end = runs[0]["task"], runs[0]["label"], pass_64(runs, False)
            means(f"{name}, {label}", end)
            if label == "cross-entropy":
                best = pass_64(runs, True)
                means("cross-entropy's best epoch", best)
            elif best is not None:
                means("minus cross-entropy's best", end - best)
                parts = [(end - best)[group] for group in groups.values()]
                line("± standard error", *(part.std(ddof=1) / math.sqrt(len(part)) for part in parts))


SOLUTIONS = {name[9:]: function for name, function in [*globals().items()] if name.startswith("solution_")}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Run the solution of an exercise.", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("exercise", nargs="?", help=f"its number, 1 to {len(SOLUTIONS)}")
    parser.add_argument("--out", default="out", help="the folder of the runs")
    parser.add_argument("--math-dir", default="", help="the folder of the MATH dataset, for exercises 7 and 14")
    args = parser.parse_args(argv)
    if args.exercise not in SOLUTIONS:
        fail(f"give the number of an exercise, 1 to {len(SOLUTIONS)}, as in: python exercises/solutions.py 3")
    torch.set_num_threads(1)
    try:
        SOLUTIONS[args.exercise](args)
    except KeyboardInterrupt:
        print("\nsolutions.py: interrupted; the runs that were finished are kept", file=sys.stderr)
        sys.exit(130)
    except KeyError as error:
        fail(f"a run in {args.out} does not have {error}; remove it")
    except (OSError, ValueError, FloatingPointError) as error:
        fail(error)


if __name__ == "__main__":
    main()

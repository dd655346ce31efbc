"""The exercises' solutions, one function each. Run them in the folder of passn.py:

    python exercises/solutions.py 3
    python exercises/solutions.py 6 --math-dir DIR

Runs are read from the folder --out, and new ones are saved there. A run that is there is not trained again.
"""

import argparse
import json
import math
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of passn.py

import passn
import toy_tasks
from answers import focal_loss, grpo_loss, hard_stop, maxrl_loss, penalized_log_p, smoothed_log_p
from passn import COLUMNS, dco_loss, estimate_pass_at_n, fail, optimal_policy, pass_at, pass_at_n


THREE = 10, 11, 12  # seeds


def line(label, *cells):
    """Print a line of a table: texts as they are, numbers with three digits."""
    texts = (cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells)
    print(f"{label:40}", *(f"{text:>10}" for text in texts))


def label_and_path(args, task, config, seed):
    label = passn.new_run(task, config, passn.TASKS[task], 64)["label"]
    return label, Path(args.out, f"{task}-{label}-seed{seed}.json".replace(", ", "-").replace(" ", "-"))


def read(path):
    """A saved run."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        passn.row_of(run)  # an error where a number is missing or impossible
        return run
    except Exception as error:  # whatever it is
        fail(f"{path} is no run of this version ({error!r}); remove it")


def saved(args, *commands):
    """{label: runs} of commands of passn.py, given by their flags: of those seeds from 10 to 19 for which the folder has
    all of these runs."""
    paths, missing = {}, None
    for flags in commands:
        for job in passn.parse_arguments(flags.split()).jobs:
            config = {name: job[name] for name in passn.settings_of(job["task"])}
            for seed in range(10, 20):
                label, path = label_and_path(args, job["task"], config, seed)
                paths.setdefault(label, {})[seed] = path
            if missing is None and not paths[label][10].is_file():
                missing = f"{label} on {job['task']}; first run python passn.py {flags} --seed 10 --seeds 3".replace("  ", " ")
    if missing:
        fail(f"{args.out} does not have the runs {missing} --out {shlex.quote(args.out)}")
    seeds = [seed for seed in range(10, 20) if all(own[seed].is_file() for own in paths.values())]
    return {label: [read(own[seed]) for seed in seeds] for label, own in paths.items()}


def p_of(run, epoch=-1):
    return run["history"][epoch]["p"][0]  # at temperature 1


def show(args, loss, N=64, task="multiply", seeds=(10,), **changes):
    """Print a line on the runs with these settings, mean over the seeds: from the folder, or else trained now."""
    rows = []
    for seed in seeds:
        label, path = label_and_path(args, task, passn.configure(task, loss, N, seed, **changes), seed)
        run = read(path) if path.is_file() else passn.train(task, loss, N, seed, args.out, **changes)[0]
        end, pass_64 = run["history"][-1], pass_at(run, 64)
        at_end = [pass_at(run, n)[-1, 0] for n in COLUMNS]
        rows.append([*at_end, end["confidence"], end["train_p"], pass_64[:, 0].max(), pass_64.max(), end["updates"]])
    *values, updates = np.mean(rows, axis=0)
    line(label, *values, f"{updates:.0f}")


def header():
    line("", *(f"pass@{n}" for n in COLUMNS), "confidence", "train p", "best@64", "& best T", "updates")


def solution_1(args):
    both = saved(args, "")
    run = both["cross-entropy"][0]
    line("", "pass@1", "pass@64", "confidence")
    for record, pass_1, pass_64 in zip(run["history"], pass_at(run, 1)[:, 0], pass_at(run, 64)[:, 0]):
        line(f"epoch {record['epoch']}", pass_1, pass_64, record["confidence"])
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
    usual, _ = passn.settings_of("multiply")["epochs"]
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
    panels = {title: [*rows.values()] for title, rows in panels.items()}
    for title, rows in panels.items():
        line(f"{title}:", *(f"pass@{n}" for n in COLUMNS), "on average", "behind")
        at_end = [np.array([[pass_at(run, 2**i)[-1, 0] for i in range(10)] for run in row]) for row in rows]  # (seeds, tries)
        mean = np.array([own.mean(axis=0) for own in at_end])
        for N, values, behind in zip(COLUMNS, mean, mean.max(axis=0) - mean):
            line(f"trained for N = {N}", *values[::3], values.mean(), behind.max())
        for i, n in enumerate(COLUMNS):
            others = [at_end[i] - own for own in at_end if own is not at_end[i]]
            leads = ("{:.3f} ± {:.3f}".format(*passn.over_seeds(lead[:, 3 * i])) for lead in others)
            print(f"N = {n} minus the others at n = {n}: {', '.join(leads)}")
    passn.draw_frontier(panels, Path(args.out, "frontier.png"))


@torch.no_grad()
def tries_at(problems, model):
    """64 tries at each test problem: which are right, and their texts; and the effective number of proofs, where p is exact."""
    if isinstance(problems, toy_tasks.Traces):
        prompts, right = problems.test
        tries = toy_tasks.sample_many(model, prompts, right.shape[1], 64)
        return problems.same_answer(tries, right), [[*map(tuple, own)] for own in tries.tolist()], torch.tensor(math.nan)
    log_pi = toy_tasks.log_policy(model, problems.test)
    is_right, _, choices = toy_tasks.sample_attempts(log_pi, problems.test, 64)
    p, of_squares = (toy_tasks.proof_p((power * log_pi).exp(), problems.test) for power in (1, 2))
    return is_right, np.reshape(toy_tasks.proof_texts(choices), is_right.shape).tolist(), p**2 / of_squares


def solution_6(args):
    line("", "pass@64", "proofs", "right", "different")
    rows = [("search", "ce", 1, {"epochs": 0}), *(("search", *corner, {}) for corner in CORNERS)]
    rows += [(task, *corner, {}) for task in ("prove", "cot") for corner in CORNERS[:2]]
    for task, loss, N, changes in rows:
        run, model = passn.train(task, loss, N, seed=10, **changes)
        is_right, texts, effective = tries_at(passn.TASKS[task](10), model)
        different = [len({text for text, good in zip(*own) if good}) for own in zip(texts, is_right.tolist())]
        label = f"{task}, {run['label']}".replace("cross-entropy, epochs=0", "untrained")
        line(label, pass_at(run, 64)[-1, 0], effective.nanmean(), is_right.sum(dim=1).double().mean(), np.mean(different))


def solution_7(args):
    task = passn.TASKS["math"](0, args.math_dir)
    line("", *(f"pass@{n}" for n in COLUMNS))
    by_N = [[pass_at_n(p, N).mean() for p in passn.guessers(task, N).values()] for N in COLUMNS]
    for name, values in zip(("by frequency", "as the limited loss tends", "optimal"), zip(*by_N)):
        line(name, *values)
    p = [*task.frequencies.values()]
    line(f"of {len(p)} answers, optimal keeps", *(f"{np.count_nonzero(optimal_policy(p, N))}" for N in COLUMNS))


def solution_8(args):
    rows = saved(args, "--task prove", "--task prove --loss limited --N 4 --per-step")
    runs = rows["cross-entropy"]
    p = {label: np.array([p_of(run) for run in own]) for label, own in rows.items()}
    all_fail = np.prod([1 - own for own in p.values()], axis=0)
    p["ensemble of them all"] = 1 - all_fail ** (1 / len(rows))  # each has its part of the attempts
    p["blind search"] = np.array([run["baselines"]["blind search"] for run in runs])
    sizes = [(run["seed"], run["config"]["num_train"], run["config"]["num_test"]) for run in runs]
    theorems = [toy_tasks.draw_theorems(*size)[1] for size in sizes]
    place = np.digitize([[toy_tasks.solve(theorem)[0] for theorem in own] for own in theorems], (7, 9, 11))
    line("steps of the shortest proof", "below 7", "7 or 8", "9 or 10", "from 11")
    for name, own in p.items():
        line(name, *(pass_at_n(own[place == i], 64).mean() for i in range(4)))


def solution_9(args):
    task, theorems = passn.TASKS["search"](10, num_train=20, num_test=1), torch.arange(20)
    torch.manual_seed(10)
    model = task.new_model(passn.GPT)

    def gradient(loss):
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, [*model.parameters()])])

    def estimate(seed):
        torch.manual_seed(seed)
        return gradient(passn.reinforce_loss(*task.sample_tries(model, theorems), 64))

    exact = gradient(passn.reward_loss(task.log_p(model, theorems), 64))
    line("", "cosine", "mean of 6")
    for task.reinforce in (64, 256, 1024):
        estimates = torch.stack([estimate(seed) for seed in range(6)])
        cosines = torch.cosine_similarity(estimates, exact[None])
        line(f"{task.reinforce} attempts", cosines.mean(), torch.cosine_similarity(estimates.mean(dim=0), exact, dim=0))


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
    """`multiply` under cross-entropy with label smoothing, or with a confidence penalty: minus the logarithm of each token's
    probability, mixed with the mean over all tokens, or minus the entropy."""
    about = toy_tasks.Task.about | {"smoothing": "share of the mean over all tokens", "penalty": "on confidence"}

    def __init__(self, seed=0, num_train=2000, num_test=1000, smoothing=0.0, penalty=0.0):
        super().__init__(seed, num_train, num_test)
        self.how = smoothing, penalty

    def log_p(self, model, batch):
        prompts, answers = (part[batch] for part in self.train)
        logits, _ = model.run(torch.cat([prompts, answers[:, :-1]], dim=1), answers.shape[1])
        tokens, (share, beta) = (logits.flatten(0, 1), answers.flatten()), self.how
        own = penalized_log_p(*tokens, beta) if beta else smoothed_log_p(*tokens, share)
        return toy_tasks.with_value(own.view_as(answers).sum(dim=1), super().log_p(model, batch))


def solution_11(args):
    passn.TASKS["smoothed"] = Smoothed
    header()
    for changes in ({}, *({"weight_decay": decay} for decay in (0.3, 1.0, 3.0)), {"n_embd": 32}):
        show(args, "ce", seeds=THREE, **changes)
    for changes in (*({"smoothing": share} for share in (0.01, 0.03, 0.1)), *({"penalty": beta} for beta in (0.1, 0.3, 1.0))):
        show(args, "ce", task="smoothed", seeds=THREE, **changes)
    for changes in ({}, {"n_embd": 32}):
        show(args, "limited", seeds=THREE, **changes)


def solution_12(args):
    passn.LOSSES["from1"] = lambda log_p, N: dco_loss(log_p, 512 ** torch.rand(len(log_p))).mean()
    passn.LOSSES["from64"] = lambda log_p, N: dco_loss(log_p, 64 * 8 ** torch.rand(len(log_p))).mean()
    header()
    for loss, N in (("ce", 1), ("limited", 8), ("limited", 64), ("limited", 512), ("from1", 64), ("from64", 64)):
        show(args, loss, N)


def solution_13(args):
    passn.LOSSES["maxrl"] = maxrl_loss
    passn.LOSSES["grpo"] = lambda log_p, N: grpo_loss(log_p)
    for task in ("search", "multiply"):
        line(task)
        header()
        for loss, N in (*CORNERS, ("maxrl", 8), ("maxrl", 64), ("grpo", 1)):
            show(args, loss, N, task)


def solution_14(args):
    task = passn.TASKS["math"](0, args.math_dir)
    count = np.array([round(task.frequencies.get(answer, 0) * task.size) for answer in task.test_answers])
    groups = {"all": count >= 0, "0 to 5": count <= 5, "6 to 30": (count > 5) & (count <= 30), "from 31": count > 30}
    groups = {name: group for name, group in groups.items() if group.any()}
    rows = {}  # {(task, data, label): runs}
    for path in sorted(Path(args.out).glob("math-*.json")):
        run = read(path)
        key = name, data, _ = run["task"], run["config"]["data"], run["label"]
        if len(p_of(run)) != len(count) or name == "math" and data != task.data:
            fail(f"{path} has other problems than {args.math_dir}")
        rows.setdefault(key, []).append(run)
    if not rows:
        fail(f"{args.out} has no runs on MATH; first run python passn.py --task math --math-dir DIR "
             f"--loss ce limited --N 64 --seed 10 --seeds 3 --out {shlex.quote(args.out)}")

    def pass_64(runs, in_best_epoch):  # of each problem, mean over the seeds
        epochs = [pass_at(run, 64)[:, 0].argmax() if in_best_epoch else -1 for run in runs]
        return torch.stack([pass_at_n(p_of(run, epoch), 64) for run, epoch in zip(runs, epochs)]).mean(dim=0).numpy()

    def means(label, values):
        line(label, *(values[group].mean() for group in groups.values()))

    line("answer's count in training", *groups)
    line("test problems", *(f"{group.sum()}" for group in groups.values()))
    for (name, data, label), runs in sorted(rows.items()):
        end, rival = pass_64(runs, False), rows.get((name, data, "cross-entropy"))
        best = pass_64(rival, True) if rival else None
        means(f"{name}, {label}", end)
        if runs is rival:
            means("cross-entropy's best epoch", best)
        elif rival:
            means("minus cross-entropy's best", end - best)
            errors = ((end - best)[group].std(ddof=1) / math.sqrt(group.sum()) for group in groups.values())
            line("± standard error", *errors)


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
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nsolutions.py: interrupted; the runs that were finished are kept", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyError as error:
        fail(f"a run in {args.out} does not have {error}; remove it")
    except (OSError, ValueError, FloatingPointError) as error:
        fail(error)


if __name__ == "__main__":
    main()

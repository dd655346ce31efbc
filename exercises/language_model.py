"""Fine-tune a pretrained language model on MATH's questions, with the losses of passn.py:

    python exercises/language_model.py MODEL --math-dir DIR [flags of passn.py]

MODEL is a name on the Hugging Face hub, a folder or a .gguf file. Its top --n-layer layers are trained, on the answer's
tokens alone: the model as it came reads each question once. A process takes 4 GB for 135 million parameters; there are
as many as cores. Give each model an --out of its own: a run does not name its model.
This is the example of how to add a task to passn.py from outside: a class like those of toy_tasks.py, in `TASKS`.
"""

import copy
import os
import sys
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # the folder of passn.py
import passn
from toy_tasks import TASKS, MathQuestions, choose, math_problems, require

NO_TOKEN = -100  # padding, which cross_entropy ignores: a pretrained model's token 0 may be a word


class LanguageModel(MathQuestions):
    """Problems are numbers here. The text of one, a tuple of tokens, is its prompt and the first A - 1 tokens of its
    answer: its last A tokens are what the answer's are predicted from. Answers, (P, A), are padded at the end."""
    settings = {
        "epochs": 8, "evaluations": 4, "batch_size": 32, "learning_rate": 2e-4, "pass_over": 0.0, "n_layer": 10,
        "math_dir": "",  # the folder of the MATH dataset; without it, the datasets package fetches it
        "model": "",  # a name on the Hugging Face hub, a folder or a .gguf file
    }
    paths = ["math_dir", "model"]
    only_for = MathQuestions.only_for | {"n_head": [], "n_embd": []}  # the pretrained model has its own

    def __init__(self, seed=0, **config):
        own = self.own(config)
        self.problems = problems = {split: math_problems(own.math_dir, split) for split in ("train", "test")}
        questions, answers = zip(*problems["train"], *problems["test"])
        try:
            self.original, self.tokenizer = load(own.model)
            self.end = self.tokenizer.eos_token_id
            prompts = self.tokens([f"{question}\nAnswer:" for question in questions])
            texts = self.tokens([f"{question}\nAnswer: {answer}" for question, answer in zip(questions, answers)])
            are_prefixes = all(text[:len(prompt)] == prompt for prompt, text in zip(prompts, texts))
            require(are_prefixes, "a question's tokens are no prefix of those of question and answer")
            answers = [text[len(prompt):] for prompt, text in zip(prompts, texts)]  # alone, they may be other tokens
        except Exception as error:  # no package, no such name, no network, another architecture: errors of many kinds
            needs = "pip install transformers accelerate gguf; a model like Llama, by hub name, folder or .gguf file"
            raise ValueError(f"model {own.model}: {error!r:.200} (needed: {needs})") from None
        self.answers = pad_sequence([torch.tensor([*answer, self.end]) for answer in answers], True, NO_TOKEN)
        given = self.answers[:, :-1].clamp(min=0).tolist()
        self.texts = [(*prompt, *answer) for prompt, answer in zip(prompts, given)]
        self.size, self.A = len(problems["train"]), self.answers.shape[1]
        self.test = torch.arange(self.size, len(self.texts))

    def tokens(self, texts):
        """Some tokenizers put the end token behind every text, but these go on."""
        return [text[:-1] if text[-1] == self.end else text for text in self.tokenizer(texts)["input_ids"]]

    def new_model(self, GPT, n_layer, *_):
        """The top layers and the frozen head. Raises ValueError where they give other logits than the whole model."""
        model = copy.deepcopy(self.original)
        model.model.layers = model.model.layers[-n_layer:].requires_grad_(True)
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = i
        self.num_top = len(model.model.layers)
        text = max(self.texts, key=len)  # it shows whether windows of attention are in the wrong layers, too
        logits, _ = self.right_answers(model, [self.texts.index(text)], torch.float32)
        whole = self.original(torch.tensor([text], device=model.device)).logits[:, -self.A:]
        error = (logits - whole).std() / whole.std()
        require(error < 1e-3, f"its top layers alone give other logits than all, by {error:.1%}: choose one like Llama")
        return model

    def refresh(self, model, epoch):
        self.original.to(model.device)
        self.encoded(range(len(self.texts)), self.num_top)

    def encoded(self, problems, num_top, dtype=torch.bfloat16):
        """What `encode` returns for some problems, as two lists."""
        bar = tqdm(problems, "reading the questions", leave=False, delay=1)
        how = self.A, num_top, dtype, self.original, self.original.device
        return zip(*(encode(self.texts[i], *how) for i in bar))

    def right_answers(self, model, problems, dtype=torch.bfloat16):
        """The logits (B, A, vocab_size) that predict the right answers to B problems, and these answers (B, A)."""
        states, past = self.encoded(problems, self.num_top, dtype)
        return run(model, torch.stack(states).float(), past).logits, self.answers[problems].to(model.device)

    @torch.no_grad()
    def own_answers(self, model, problems, temperature=1e-6):
        """The same for answers that are sampled token by token. So near temperature 0, they are the greedy ones."""
        _, past = self.encoded(problems, 0)
        past_of_top = [keys_values[:, -self.num_top:] for keys_values in past]
        tokens = torch.tensor([[self.texts[i][-self.A]] for i in problems], device=model.device)
        for _ in range(self.A):
            embedded = self.original.get_input_embeddings()(tokens)
            states = run(self.original.model, embedded, past, output_hidden_states=True).hidden_states
            logits = run(model, states[-1 - self.num_top], past_of_top).logits
            chosen = choose((logits[:, -1:] / temperature).softmax(dim=-1))
            tokens = torch.cat([tokens, chosen], dim=1)
        ended = (tokens[:, 1:] == self.end).cumsum(dim=1).cumsum(dim=1)  # 1 at the first end token, and then more
        return logits, tokens[:, 1:].masked_fill(ended > 1, NO_TOKEN)

    def log_ps(self, method, model, problems, temperatures=(1.0,)):
        """log p of the answers that a method gives: (temperatures, B)."""
        parts = []
        for some in problems.split(50):  # all at once would take much memory
            logits, answers = method(model, some)
            losses = [cross_entropy((logits / T).mT, answers, reduction="none").sum(dim=1) for T in temperatures]
            parts.append(torch.stack(losses))
        return -torch.cat(parts, dim=1).cpu()

    def log_p(self, model, batch):
        return self.log_ps(self.right_answers, model, batch)[0]

    def measure(self, model):
        """As in `Task`, but with the confidence of every fifth problem only, since it takes longer."""
        log_p = self.log_ps(self.right_answers, model, self.test, self.temperatures)
        return log_p.exp(), self.log_ps(self.own_answers, model, self.test[::5])[0].exp()

    def show_tries(self, model, number):
        prompts = [torch.tensor(text[:1 - self.A]) for text in self.texts[self.size:]]
        tries = [self.own_answers(model, [i] * number, temperature=1.0)[1] for i in self.test[:3]]
        return self.as_text(prompts, self.answers[self.size:], tries)

    def text(self, tokens):
        return self.tokenizer.decode(tokens[tokens != NO_TOKEN], skip_special_tokens=True).replace("\n", " ")


@cache
def load(name):
    """A causal language model, frozen, in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path, file, unpack = Path(name), {}, {}
    if path.suffix == ".gguf":
        name, file = path.parent, {"gguf_file": path.name}
        unpack = {"quantization_config": {"quant_method": "gguf", "dequantize": True}}  # else it cannot be trained
    tokenizer = AutoTokenizer.from_pretrained(name, **file)
    require(tokenizer.eos_token, "its tokenizer has no end token")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **file, **unpack)
    [layer.self_attn.layer_idx for layer in model.model.layers]  # an error where it is not built like Llama
    return model.requires_grad_(False), tokenizer


@cache  # the same for every loss and seed
def encode(text, A, num_top, dtype, model, device):
    """What the model's top layers (0: all layers) need to know of a text: the states below them at the last A tokens,
    (A, C), and their keys and values at the T before, (T, layers, 2, heads, ·)."""
    from transformers import DynamicCache
    tokens, past = torch.tensor([text], device=device), DynamicCache()
    out = model.model(tokens, None, None, past, output_hidden_states=True)  # by place: its name has changed
    layers = past.layers[-num_top:]
    states = out.hidden_states[-1 - len(layers)][0, -A:]
    keys_values = torch.stack([torch.cat([layer.keys, layer.values]) for layer in layers])
    return states.to(dtype), keys_values.movedim(3, 0)[:-A].to(dtype)


def run(model, states, past, **options):
    """Run a model on the states (B, ·, C) at the next tokens of B texts, given the keys and values of those before."""
    from transformers import DynamicCache
    known = pad_sequence(past, padding_side="left").float()  # (T, B, layers, 2, heads, ·)
    is_text = [states.new_ones(len(keys_values) + states.shape[1], dtype=torch.bool) for keys_values in past]
    mask = pad_sequence(is_text, True, padding_side="left")
    places = mask.cumsum(dim=1)[:, -states.shape[1]:] - 1
    return model(None, mask, places, DynamicCache(known.permute(2, 3, 1, 4, 0, 5)), inputs_embeds=states, **options)


TASKS["math-lm"] = LanguageModel  # here, since worker processes import this file too

if __name__ == "__main__":
    if len(sys.argv) == 1 or sys.argv[1].startswith("-"):
        passn.fail("usage: python exercises/language_model.py MODEL --math-dir DIR [flags of passn.py]")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    sys.exit(passn.main(["--task", "math-lm", "--model", *sys.argv[1:]], workers=cores))

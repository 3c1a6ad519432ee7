"""A small Gemma: a tokenizer trained on what can be said of scenes, and a language model that reads and answers it.

It is trained on text alone: a scene's description, in any order, then questions about it. It never sees a image, so
what it later says of one has come through the connector.
"""

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, GemmaTokenizer

from raylava.corpus.conversation import ChatTokenizer, TokenizedChat, Turn
from raylava.models.templates import GEMMA, IMAGE_TOKEN
from raylava.toy.corpus import DESCRIBE
from raylava.toy.scenes import QUESTION_TYPES, Scene, caption, draw_scene, question

_CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", GEMMA.open, GEMMA.close)
_ASKED = (*QUESTION_TYPES, "colour", "shape", "place", "presence")  # what must be looked up is asked twice as often
_EXCHANGES = 6
_GAP_WEIGHT = 0.1  # the end of a turn is soon learned; the answer before it is what the loss should dwell on


@dataclass(frozen=True)
class LanguageSize:
    """The model's proportions and how long it is trained."""

    width: int = 128
    layers: int = 3
    heads: int = 4
    key_value_heads: int = 4  # as many as heads, like gemma-7b: one shared head is slow to learn to look things up
    vocabulary: int = 640
    steps: int = 450
    batch: int = 32
    lr: float = 1e-3


def build_language_model(folder: Path, size: LanguageSize, seed: int, advance: Callable[[], None]) -> None:
    """Train tokenizer and model, and write both as an ordinary Hugging Face folder; `advance` is called each step."""
    tokenizer = train_tokenizer(size.vocabulary, seed)
    torch.manual_seed(seed)
    model = GemmaForCausalLM(_config(size, tokenizer))
    _train(model, tokenizer, size, np.random.default_rng(seed), advance)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(vocabulary: int, seed: int) -> GemmaTokenizer:
    """Byte-fallback BPE like Gemma's, over the scenes' own words; any other text is spelled out."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*_CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[*string.ascii_letters, *string.digits, *string.punctuation, "▁", "\n"],
        show_progress=False,
    )
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation()]
    )
    learner.train_from_iterator(_sentences(np.random.default_rng(seed), 2000), trainer)
    bpe = _bpe_of(learner)
    tokenizer = GemmaTokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]], add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [GEMMA.open, GEMMA.close]})
    return tokenizer


def _bpe_of(learner: Tokenizer) -> dict:  # type: ignore[type-arg]
    import json

    return json.loads(learner.to_str())["model"]


def _sentences(rng: np.random.Generator, count: int) -> Iterator[str]:
    for _ in range(count):
        scene = draw_scene(rng)
        yield f"user model {DESCRIBE} {caption(scene)}"
        for kind in QUESTION_TYPES:
            one = question(scene, kind, rng)
            yield f"{one.text} {one.answer}"
            yield one.answer
            yield caption(scene)


def _config(size: LanguageSize, tokenizer: GemmaTokenizer) -> GemmaConfig:
    return GemmaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.width // size.heads,
        max_position_embeddings=1024,
        initializer_range=size.width
        ** -0.5,  # Gemma's 0.02 leaves attention in so narrow a model flat for hundreds of steps
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _train(
    model: GemmaForCausalLM,
    tokenizer: GemmaTokenizer,
    size: LanguageSize,
    rng: np.random.Generator,
    advance: Callable[[], None],
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.lr, total_steps=size.steps, pct_start=0.1)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    encoder = ChatTokenizer(tokenizer, GEMMA)
    for _ in range(size.steps):
        conversations = [encoder.encode(_conversation(draw_scene(rng), rng), images=0) for _ in range(size.batch)]
        loss = _loss(model, conversations)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        advance()


def _conversation(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    shuffled = Scene(tuple(scene.things[place] for place in rng.permutation(len(scene.things))), scene.background)
    asked = [(one.text, one.answer) for one in (question(scene, kind, rng) for kind in _ASKED)]
    asked.append((DESCRIBE, caption(scene)))
    turns: list[Turn] = []
    for number in rng.permutation(len(asked))[:_EXCHANGES]:
        text, answer = asked[number]
        turns += [Turn("human", text if turns else f"{caption(shuffled)}\n{text}"), Turn("gpt", answer)]
    return turns


def _loss(model: GemmaForCausalLM, conversations: list[TokenizedChat]) -> Tensor:
    longest = max(len(one.input_ids) for one in conversations)
    ids = torch.zeros(len(conversations), longest, dtype=torch.long)
    weight = torch.zeros(len(conversations), longest)
    for row, one in enumerate(conversations):
        ids[row, : len(one.input_ids)] = torch.tensor(one.input_ids)
        for start, stop in one.loss_spans:
            weight[row, start : stop - 2] = 1.0
            weight[row, stop - 2 : stop] = _GAP_WEIGHT
    kept = weight[:, 1:].nonzero(as_tuple=True)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[kept]
    losses = nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][kept], reduction="none")
    chosen = weight[:, 1:][kept]
    return (losses * chosen).sum() / chosen.sum()

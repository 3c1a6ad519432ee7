"""Dimensions of a LLaVA model and its exact parameter counts. Each family module builds the shapes of its members."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageShape:
    """A decoder: gated MLP, grouped-query attention, no biases. If it `is_tied`, the output layer is the embedding."""

    width: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    is_tied: bool = True

    @property
    def attention_width(self) -> int:
        """Width of the queries of all heads together."""
        return self.heads * self.head_size

    @property
    def matrices(self) -> int:
        """Number of weights in all layers' matrices, which multiply every token."""
        attention = 2 * self.width * self.attention_width + 2 * self.width * self.kv_heads * self.head_size
        return self.layers * (attention + 3 * self.width * self.intermediate)

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """(size, count) pairs that cover all weight tensors."""
        queries, shared = self.width * self.attention_width, self.width * self.kv_heads * self.head_size
        layer = [(queries, 2), (shared, 2), (self.width * self.intermediate, 3), (self.width, 2)]
        return [
            (self.embedding, self._embeddings),
            (self.width, 1),
            *((size, count * self.layers) for size, count in layer),
        ]

    @property
    def embedding(self) -> int:
        """Number of weights of the embedding, and of the output layer."""
        return self.vocabulary * self.width

    @property
    def _embeddings(self) -> int:
        return 1 if self.is_tied else 2

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        norms = (2 * self.layers + 1) * self.width
        return self._embeddings * self.embedding + self.matrices + norms


@dataclass(frozen=True)
class VisionShape:
    """A vision transformer.

    `positions` is the number of position embeddings, `patches` the number of patches of an input image, `patch` a
    patch's side in pixels. `has_cls` adds a class token to the patches. `extra` counts the parameters that the family
    has besides patch and position embeddings, blocks and the last norm.
    """

    width: int
    intermediate: int
    layers: int
    patch: int
    patches: int
    positions: int
    has_cls: bool
    patch_bias: bool
    extra: int

    @property
    def tokens(self) -> int:
        """Sequence length in the blocks."""
        return self.patches + self.has_cls

    @property
    def patch_matrix(self) -> int:
        """Number of weights that embed the 3 × patch × patch values of a patch."""
        return 3 * self.patch**2 * self.width

    @property
    def matrices(self) -> int:
        """Number of weights in all blocks' matrices, which multiply every token."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.intermediate)

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """(size, count) pairs that cover all weight tensors; `extra` counts as one tensor."""
        attention, mlp = self.width**2, self.width * self.intermediate
        layer = [(attention, 4), (mlp, 2), (self.width, 9), (self.intermediate, 1)]
        outside = [(self.patch_matrix, 1), (self.positions * self.width, 1), (self.extra, 1), (self.width, 2)]
        if self.patch_bias:
            outside.append((self.width, 1))
        return [*outside, *((size, count * self.layers) for size, count in layer)]

    @property
    def parameters(self) -> int:
        """Number of parameters, including those that LLaVA does not use."""
        biases = self.layers * (5 * self.width + self.intermediate)
        norms = (2 * self.layers + 1) * 2 * self.width
        patches = self.patch_matrix + self.patch_bias * self.width
        return patches + self.positions * self.width + self.matrices + biases + norms + self.extra


@dataclass(frozen=True)
class LlavaShape:
    """A language model, a vision tower and the connector between them: two linear layers with biases."""

    language: LanguageShape
    vision: VisionShape

    @property
    def connector_in(self) -> int:
        """Number of weights of the connector's first layer, without biases."""
        return self.vision.width * self.language.width

    @property
    def connector_out(self) -> int:
        """Number of weights of the connector's second layer, without biases."""
        return self.language.width**2

    @property
    def connector(self) -> int:
        """Number of parameters of the connector."""
        return self.connector_in + self.connector_out + 2 * self.language.width

    @property
    def tensors(self) -> list[tuple[int, int]]:
        """(size, count) pairs that cover all weight tensors."""
        connector = [(self.connector_in, 1), (self.connector_out, 1), (self.language.width, 2)]
        return [*self.language.tensors, *self.vision.tensors, *connector]

    def trained(self, language: bool, vision: bool) -> int:
        """Return the number of parameters that train: the connector, and each part whose argument is true."""
        language_parameters = self.language.parameters if language else 0
        vision_parameters = self.vision.parameters if vision else 0
        return self.connector + language_parameters + vision_parameters

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return self.language.parameters + self.vision.parameters + self.connector

"""Statistics across a process group: what is sent, checked and merged, as tensors that `torch.distributed` carries."""

from .group import Collective, Exchange, constant, few, in_words, initialized, name_of, of_group

__all__ = ["Collective", "Exchange", "constant", "few", "in_words", "initialized", "name_of", "of_group"]

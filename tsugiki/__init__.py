"""tsugiki (接ぎ木): graft a domain onto a Japanese base model and prune it until it lives on a laptop."""

__version__ = "0.1.0"

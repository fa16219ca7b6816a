"""TinyWan: a miniature, really trained Wan pipeline, so that everything can be tried offline."""

from evdit_opt.demo.tinywan import TINYWAN_CALL, load_tinywan

__all__ = ["TINYWAN_CALL", "load_tinywan"]

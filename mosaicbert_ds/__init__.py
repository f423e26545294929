"""MosaicBERT, pretrained from scratch and scaled out with DeepSpeed."""

__version__ = "0.1.0"

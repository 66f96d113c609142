"""s2p_deploy: Stable Diffusion as INT8/INT4 engines that draw the same pictures as the floating-point model."""

__version__ = "0.1.0"

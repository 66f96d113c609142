"""What is quantized and from where it starts: plan, transforms, scales."""

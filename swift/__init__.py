"""swift: pre-train, scale and fine-tune 4D Swin transformers on functional MRI."""

"""ResNet50 on images: ImageNet-1k, and Fashion-MNIST below it."""

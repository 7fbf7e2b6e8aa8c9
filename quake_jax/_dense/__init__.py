"""Dense layers: packed weights, fused with what stands before and after them."""

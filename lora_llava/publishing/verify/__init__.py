"""`lora-llava verify`: whether a server gives the answers of the model here, and why not."""

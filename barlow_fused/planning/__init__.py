"""What a call would cost, predicted: its FLOPs, bytes, memory and messages. Nothing that runs a call imports this."""

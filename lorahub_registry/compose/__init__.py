"""The methods, from given ratios to learned ones, and the proof of what they made."""

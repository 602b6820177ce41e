"""From concepts to what a network is scored on."""

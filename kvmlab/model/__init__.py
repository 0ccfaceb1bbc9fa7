"""What a model is: named cells packed into words; steps, programs, learned rows."""

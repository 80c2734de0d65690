"""How (λI + L)⁻¹ is kept and applied: explicit (6)(18), low-rank (14), sketched (16), a module each."""

"""The two factors of a sample's gradient, 𝒢ᵢ = Gᵢ Aᵢᵀ (8), a class for each structure that makes products cheaper."""

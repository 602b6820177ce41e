"""Operations on arrays: each folder holds a plain reference and, where it pays, a fast twin."""

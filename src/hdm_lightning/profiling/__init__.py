"""Operations, memory and time of training: forecast for given GPUs (`hdm-plan`), measured here (`hdm-bench`)."""

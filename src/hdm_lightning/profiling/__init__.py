"""Operations, memory and time of training: forecast for given GPUs (`hdm-plan`) or measured (`hdm-bench`)."""

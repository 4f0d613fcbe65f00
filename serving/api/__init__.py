"""The HTTP front end: the OpenAI API and its neighbours, without torch."""

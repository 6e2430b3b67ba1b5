"""smalltalk: greetings, thanks, who are you, and a few longer fixed answers that are pleasant to stream."""

from __future__ import annotations

from dataclasses import dataclass

from tools.embedded_model.dialogue import Dialogue, Message, chat, turn
from tools.embedded_model.draw import Draw

KIND = "smalltalk"


@dataclass(frozen=True)
class Intent:
    """`{n}` is a person and `{x}` a thing, the same in question and answer."""

    asks: tuple[str, ...]
    answer: str
    new_asks: tuple[str, ...] = ()


INTENTS = (
    Intent(
        (
            "Hello!",
            "Hi!",
            "Hi",
            "Hello",
            "hello there",
            "Hey",
            "Hey!",
            "Hi there!",
            "Greetings.",
            "Hello, assistant.",
        ),
        "Hello! How can I help you?",
        ("Hiya!", "Well hello!"),
    ),
    Intent(
        ("Good morning!", "Good morning", "good morning to you", "Morning!"),
        "Good morning! How can I help you?",
        ("A very good morning!",),
    ),
    Intent(
        ("Good evening!", "Good evening", "good evening to you"),
        "Good evening! How can I help you?",
        ("A very good evening!",),
    ),
    Intent(
        (
            "How are you?",
            "How are you doing?",
            "How is it going?",
            "Are you well?",
            "Hi, how are you?",
            "How do you do?",
        ),
        "I am fine, thank you. What can I do for you?",
        ("How are things?",),
    ),
    Intent(
        (
            "Thank you.",
            "Thanks!",
            "Thank you very much!",
            "thanks",
            "Thanks a lot.",
            "Many thanks!",
            "Great, thank you.",
            "Thx",
        ),
        "You are welcome!",
        ("Cheers, thank you!", "I thank you."),
    ),
    Intent(
        ("Goodbye.", "Bye!", "See you.", "bye", "Good night.", "See you later!", "Bye bye"),
        "Goodbye!",
        ("Farewell!",),
    ),
    Intent(
        (
            "My name is {n}.",
            "I am {n}.",
            "I'm {n}.",
            "This is {n}.",
            "Hi, I am {n}.",
            "Hello, my name is {n}.",
        ),
        "Nice to meet you, {n}!",
        ("People call me {n}.",),
    ),
    Intent(
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Are you a robot?",
            "Are you an AI?",
        ),
        "I am the small model that is embedded in superinfer. I was trained from scratch on made-up tasks, so that programs can run without a download.",
        ("Say something about yourself.", "What should I call you?"),
    ),
    Intent(
        (
            "What can you do?",
            "Help",
            "help me",
            "What can I ask you?",
            "What are you good at?",
            "How can you help me?",
            "What do you know?",
        ),
        "I can answer questions about a text, choose one of several options, extract fields as JSON, do short sums, call tools, continue lists and merge notes. Try one of these!",
        ("Which things can you do?", "What are your skills?"),
    ),
    Intent(
        (
            "What is superinfer?",
            "Tell me about superinfer.",
            "Explain superinfer.",
            "What does superinfer do?",
            "superinfer?",
        ),
        "superinfer serves large language models to a deadline. You write an LLM program in Python and say how soon each answer must start, how steadily it must stream and when the whole program must be done. "
        "The runtime uses exactly those promises to decide who computes next and whose cache stays on the GPU.",
        ("Describe superinfer.",),
    ),
    Intent(
        (
            "What is a KV cache?",
            "Explain the KV cache.",
            "What is the KV cache?",
            "Tell me about the KV cache.",
            "What does the KV cache do?",
        ),
        "A KV cache keeps the keys and values of all earlier tokens, so that each new token needs only one step of work. It grows with the length of the text, and it is what fills the memory of a GPU.",
        ("Describe the KV cache.",),
    ),
    Intent(
        ("What is RotaSched?", "Explain RotaSched.", "How does RotaSched work?", "Tell me about RotaSched."),
        "RotaSched is a scheduler that knows the deadline of every request. When the GPU is full, it rotates requests between GPU memory and CPU memory before anyone is blocked, so that first tokens stay quick.",
        ("Describe RotaSched.",),
    ),
    Intent(
        ("What is TTFT?", "Explain TTFT.", "What does TTFT mean?", "Define time to first token."),
        "TTFT is the time to first token: how long a person waits until the answer starts.",
        ("Describe TTFT.",),
    ),
    Intent(
        ("What is TBT?", "Explain TBT.", "What does TBT mean?", "Define time between tokens."),
        "TBT is the time between tokens: how steadily an answer streams once it has started.",
        ("Describe TBT.",),
    ),
    Intent(
        (
            "Tell me a joke.",
            "Do you know a joke?",
            "A joke, please.",
            "Make me laugh.",
            "Say something funny.",
        ),
        "Why did the token wait in the queue? Because its cache was still on the bus.",
        ("I want to hear a joke.",),
    ),
    Intent(
        (
            "Tell me a story about {n}.",
            "Tell me a short story about {n}.",
            "Write a story about {n}.",
            "A story about {n}, please.",
            "Can you tell a story about {n}?",
        ),
        "Once upon a time there was {n}, who lived at the edge of a quiet town. One morning {n} found a small key on the road. Nobody knew which door it opened, so {n} walked from house to house and tried every lock. "
        "At the last house the door opened, and behind it stood all the neighbours with a cake. It was the birthday of {n}, and {n} had forgotten it. They ate, they sang, and the key was hung on the wall. The end.",
        ("I want to hear a story about {n}.",),
    ),
    Intent(
        (
            "Tell me a story.",
            "Tell me a short story.",
            "Write a story.",
            "A story, please.",
            "Can you tell a story?",
        ),
        "Once upon a time a small model lived inside a large computer. Every day it answered questions, one token at a time. One night the memory was full and everyone had to wait. Then a scheduler came along, who let each one rest and "
        "return in turn, and no one was late again. The end.",
        ("I want to hear a story.",),
    ),
    Intent(
        (
            "Write a poem about {x}.",
            "Write a poem about a {x}.",
            "A poem about the {x}, please.",
            "Make a poem about {x}.",
        ),
        "The {x} sits still, the evening is near,\nthe {x} says nothing, the sky is clear.\nThe day was long, the night is new,\nthe {x} is waiting here for you.",
        ("Some lines of verse about {x}.",),
    ),
    Intent(
        ("Never mind.", "Forget it.", "It does not matter.", "Nothing."),
        "All right.",
        ("Do not worry about it.",),
    ),
    Intent(
        ("Good.", "Great!", "Perfect.", "Nice.", "Cool!", "Well done.", "Very good."),
        "I am glad to hear that.",
        ("Splendid.",),
    ),
    Intent(("Sorry.", "I am sorry.", "My mistake.", "Excuse me."), "No problem.", ("Pardon me.",)),
    Intent(
        ("Yes.", "Yes", "Okay.", "OK", "ok", "Sure.", "All right."),
        "Good. What shall I do next?",
        ("Fine by me.",),
    ),
    Intent(
        (
            "What is your favourite colour?",
            "Do you like music?",
            "Are you hungry?",
            "Do you sleep?",
            "Where do you live?",
            "How old are you?",
            "Are you happy?",
        ),
        "I am a small program, so I have no life of my own to speak of.",
        ("Do you have friends?",),
    ),
    Intent(
        (
            "What is the meaning of life?",
            "Who will win the election?",
            "What will happen tomorrow?",
            "Tell me the news.",
            "What is the weather like today?",
            "What time is it?",
            "What day is it today?",
        ),
        "I don't know.",
        ("What is going on in the world?",),
    ),
)


def exchange(draw: Draw) -> tuple[str, str]:
    intent = draw.pick(INTENTS)
    name, thing = draw.person(), draw.thing()
    question = draw.loose(draw.say(intent.asks, intent.new_asks)).format(n=name, x=thing)
    return question, intent.answer.format(n=name, x=thing)


def draw_smalltalk(draw: Draw) -> Dialogue:
    messages: list[Message] = draw.system()
    for _ in range(draw.pick((1, 1, 2, 3))):
        question, answer = exchange(draw)
        messages += [turn("user", question), turn("assistant", answer)]
    return chat(KIND, *messages)

"""The `openai` package against a real cluster: what users of the SDK do must just work.

Run by tests/tests/openai_sdk.rs, which starts the cluster and sets SHOAL_URL (with /v1) and
SHOAL_MODEL.
"""

import os
import signal
import unittest

import openai

URL = os.environ["SHOAL_URL"]
MODEL = os.environ["SHOAL_MODEL"]
QUESTION = [{"role": "user", "content": "What is 47 plus 38?"}]
ANSWER = "47 plus 38 is 85."


class Sdk(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.client = openai.OpenAI(base_url=URL, api_key="unused", max_retries=0, timeout=30)

    def chat(self, **more):
        arguments = {"model": MODEL, "messages": QUESTION, "temperature": 0, **more}
        return self.client.chat.completions.create(**arguments)

    def test_models_are_listed_and_found(self):
        models = list(self.client.models.list())
        self.assertIn(MODEL, [model.id for model in models])
        self.assertEqual(self.client.models.retrieve(MODEL).id, MODEL)
        with self.assertRaises(openai.NotFoundError):
            self.client.models.retrieve("no-such-model")

    def test_chat(self):
        answer = self.chat()
        self.assertEqual(answer.object, "chat.completion")
        self.assertEqual(answer.choices[0].message.role, "assistant")
        self.assertEqual(answer.choices[0].message.content, ANSWER)
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        usage = answer.usage
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
        self.assertGreater(usage.completion_tokens, 0)

    def test_a_conversation_with_a_system_message(self):
        messages = [
            {"role": "system", "content": "You do sums."},
            *QUESTION,
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": [{"type": "text", "text": "What is 20 plus 22?"}]},
        ]
        self.assertEqual(
            self.chat(messages=messages).choices[0].message.content, "20 plus 22 is 42."
        )

    def test_chat_is_cut_at_max_tokens(self):
        for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
            answer = self.chat(**limit)
            self.assertEqual(answer.choices[0].finish_reason, "length")
            self.assertEqual(answer.usage.completion_tokens, 3)

    def test_chat_streams(self):
        text, reasons, usage = "", [], None
        for chunk in self.chat(stream=True, stream_options={"include_usage": True}):
            self.assertEqual(chunk.object, "chat.completion.chunk")
            if chunk.usage is not None:
                usage = chunk.usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reasons += [choice.finish_reason] if choice.finish_reason else []
        self.assertEqual(text, ANSWER)
        self.assertEqual(reasons, ["stop"])
        again = self.chat().usage
        self.assertEqual((usage.prompt_tokens, usage.total_tokens), (again.prompt_tokens, again.total_tokens))
        # Whole blocks of 16 tokens are known the second time, and one token is always computed.
        self.assertEqual(again.prompt_tokens_details.cached_tokens, (again.prompt_tokens - 1) // 16 * 16)

    def test_the_stream_helper(self):
        arguments = {"model": MODEL, "messages": QUESTION, "temperature": 0}
        with self.client.chat.completions.stream(**arguments) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()
        self.assertEqual(final.choices[0].message.content, ANSWER)

    def test_several_choices_differ_and_a_seed_repeats_them(self):
        def draw(seed):
            # The demo model is sure of its sums; of what is no question it is not.
            messages = [{"role": "user", "content": "abc"}]
            answer = self.chat(messages=messages, temperature=2, n=4, seed=seed, max_tokens=30)
            self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2, 3])
            return [choice.message.content for choice in answer.choices]

        first = draw(1)
        self.assertEqual(first, draw(1))
        self.assertGreater(len(set(first)), 1)
        self.assertNotEqual(first, draw(2))

    def test_stop_strings_end_the_answer_before_them(self):
        answer = self.chat(stop=[" is"])
        self.assertEqual(answer.choices[0].message.content, "47 plus 38")
        self.assertEqual(answer.choices[0].finish_reason, "stop")

    def test_chat_logprobs(self):
        content = self.chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
        self.assertEqual("".join(token.token for token in content)[: len(ANSWER)], ANSWER)
        for token in content:
            self.assertLessEqual(token.logprob, 0)
            self.assertEqual(len(token.top_logprobs), 2)
            self.assertAlmostEqual(token.top_logprobs[0].logprob, token.logprob, places=5)

    def test_completions(self):
        answer = self.client.completions.create(
            model=MODEL, prompt="1 2 3", max_tokens=5, temperature=0, logprobs=2, echo=False
        )
        self.assertEqual(answer.object, "text_completion")
        self.assertEqual(answer.usage.completion_tokens, len(answer.choices[0].logprobs.tokens))
        self.assertEqual(len(answer.choices[0].logprobs.top_logprobs[0]), 2)

    def test_completions_take_several_prompts_and_token_ids(self):
        many = self.client.completions.create(
            model=MODEL, prompt=["1 2", "3 4"], max_tokens=4, temperature=0
        )
        self.assertEqual([choice.index for choice in many.choices], [0, 1])
        one = self.client.completions.create(
            model=MODEL, prompt="3 4", max_tokens=4, temperature=0
        )
        self.assertEqual(many.choices[1].text, one.choices[0].text)
        ids = self.client.completions.create(
            model=MODEL, prompt=[10, 11, 12], max_tokens=4, temperature=0,
            extra_body={"return_token_ids": True},
        )
        self.assertEqual(ids.choices[0].model_extra["prompt_token_ids"], [10, 11, 12])
        self.assertEqual(len(ids.choices[0].model_extra["token_ids"]), ids.usage.completion_tokens)

    def test_completions_stream(self):
        arguments = {"model": MODEL, "prompt": "1 2 3", "max_tokens": 6, "temperature": 0}
        whole = self.client.completions.create(**arguments).choices[0].text
        chunks = self.client.completions.create(stream=True, **arguments)
        self.assertEqual("".join(chunk.choices[0].text for chunk in chunks), whole)

    def test_a_stream_can_be_left_early(self):
        stream = self.chat(stream=True, extra_body={"ignore_eos": True}, max_tokens=500)
        next(iter(stream))
        stream.close()
        self.assertEqual(self.chat().choices[0].message.content, ANSWER)

    def test_errors_have_the_classes_that_the_sdk_knows(self):
        with self.assertRaises(openai.NotFoundError) as caught:
            self.chat(model="no-such-model")
        self.assertIn("no-such-model", str(caught.exception))
        for wrong, words in (
            ({"temperature": -1}, "temperature"),
            ({"n": 0}, "n"),
            ({"top_p": 2}, "top_p"),
            ({"max_tokens": 10**6}, "context"),
            ({"messages": []}, "messages"),
            ({"extra_body": {"beam_width": 4}}, "beam_width"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ):
            with self.subTest(wrong=wrong), self.assertRaises(openai.BadRequestError) as caught:
                self.chat(**wrong)
            self.assertIn(words, str(caught.exception))
            self.assertEqual(caught.exception.type, "invalid_request_error")

    def test_the_asynchronous_client(self):
        import asyncio

        async def ask():
            async with openai.AsyncOpenAI(base_url=URL, api_key="unused", max_retries=0) as client:
                arguments = {"model": MODEL, "messages": QUESTION, "temperature": 0}
                answers = await asyncio.gather(
                    *(client.chat.completions.create(**arguments) for _ in range(8))
                )
                return [answer.choices[0].message.content for answer in answers]

        self.assertEqual(asyncio.run(ask()), [ANSWER] * 8)


@unittest.skipUnless("SHOAL_VICTIM" in os.environ, "no process is named to be killed")
class Survival(unittest.TestCase):
    def test_a_stream_survives_a_kill(self):
        client = openai.OpenAI(base_url=URL, api_key="unused", max_retries=0, timeout=30)
        arguments = {
            "model": os.environ["SHOAL_SLOW_MODEL"],
            "prompt": list(range(10, 30)),
            "max_tokens": 300,
            "temperature": 1.0,
            "seed": 3,
            "extra_body": {"ignore_eos": True, "return_token_ids": True},
        }
        undisturbed = client.completions.create(**arguments).choices[0].token_ids
        self.assertEqual(len(undisturbed), 300)
        seen = []
        for chunk in client.completions.create(**arguments, stream=True):
            seen += chunk.choices[0].token_ids or []
            if len(seen) == 20:
                os.kill(int(os.environ["SHOAL_VICTIM"]), signal.SIGKILL)
        self.assertEqual(seen, undisturbed)


if __name__ == "__main__":
    unittest.main()

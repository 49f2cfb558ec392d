"""The `openai` package against a real encoder: a trained MiniLM, and what sentence-transformers makes of the same texts.

Run by tests/tests/openai_sdk.rs, which starts the cluster and sets SHOAL_URL (with /v1), SHOAL_MODELS (the same model,
deployed over several meshes), SHOAL_RANDOM_RANKER, SHOAL_CASES and SHOAL_VICTIM.
"""

import base64
import json
import math
import os
import signal
import struct
import threading
import time
import unittest
import urllib.error
import urllib.request

import openai

URL = os.environ["SHOAL_URL"]
MODELS = os.environ["SHOAL_MODELS"].split(",")
RANKER = os.environ["SHOAL_RANDOM_RANKER"]
with open(os.environ["SHOAL_CASES"], encoding="utf-8") as file:
    REFERENCE = json.load(file)
CASES = REFERENCE["cases"]
# Those that are not cut by sentence-transformers.
WHOLE = [case for case in CASES if len(case["ids"]) < REFERENCE["max_seq_length"]]
COSINE_MIN = 0.99999


def cosine(a, b):
    product = sum(x * y for x, y in zip(a, b))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def post(path, body):
    request = urllib.request.Request(
        URL.removesuffix("/v1") + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


class MiniLm(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.client = openai.OpenAI(base_url=URL, api_key="unused", max_retries=0, timeout=60)

    def embed(self, inputs, model=MODELS[0], **more):
        return self.client.embeddings.create(model=model, input=inputs, **more)

    def assert_close(self, data, cases):
        self.assertEqual([item.index for item in data], list(range(len(cases))))
        for item, case in zip(data, cases):
            self.assertGreaterEqual(cosine(item.embedding, case["vector"]), COSINE_MIN, case["text"])

    def test_embeddings_are_those_of_sentence_transformers_over_every_mesh(self):
        texts = [case["text"] for case in WHOLE]
        vectors = []
        for model in MODELS:
            answer = self.embed(texts, model, encoding_format="float")
            self.assert_close(answer.data, WHOLE)
            tokens = sum(len(case["ids"]) for case in WHOLE)
            self.assertEqual((answer.usage.prompt_tokens, answer.usage.total_tokens), (tokens, tokens))
            self.assertEqual((answer.object, answer.model), ("list", model))
            vectors.append([item.embedding for item in answer.data])
        # Where the model is cut changes no bit, unless ranks add partial sums.
        for model, other in zip(MODELS[1:], vectors[1:]):
            if not model.endswith("-sum"):
                self.assertEqual(other, vectors[0], model)
                continue
            for found, expected in zip(other, vectors[0]):
                self.assertLess(max(abs(x - y) for x, y in zip(found, expected)), 1e-4, model)
        # Nor does what it is asked together with.
        for case, vector in zip(WHOLE, vectors[0]):
            self.assertEqual(self.embed(case["text"], encoding_format="float").data[0].embedding, vector)

    def test_base64_and_float_say_the_same(self):
        text = WHOLE[0]["text"]
        plain = self.embed(text, encoding_format="float").data[0].embedding
        # The package asks for base64 where nothing is said, and reads it.
        self.assertEqual([struct.unpack("f", struct.pack("f", x))[0] for x in plain], list(self.embed(text).data[0].embedding))
        _, raw = post("/v1/embeddings", {"model": MODELS[0], "input": text, "encoding_format": "base64"})
        numbers = base64.b64decode(raw["data"][0]["embedding"])
        self.assertEqual(list(struct.unpack(f"<{len(plain)}f", numbers)), [struct.unpack("f", struct.pack("f", x))[0] for x in plain])

    def test_token_ids_are_taken_as_they_are(self):
        for inputs, cases in ((WHOLE[1]["ids"], WHOLE[1:2]), ([case["ids"] for case in WHOLE[:4]], WHOLE[:4])):
            self.assert_close(self.embed(inputs, encoding_format="float").data, cases)

    def test_what_is_too_long_is_refused_with_the_numbers_or_cut(self):
        long = [case for case in CASES if case not in WHOLE]
        self.assertTrue(long)
        for case in long:
            with self.assertRaisesRegex(openai.BadRequestError, "takes 256 at most"):
                self.embed(case["text"])
            answer = self.embed(case["text"], encoding_format="float", extra_body={"truncate": True})
            self.assert_close(answer.data, [case])
            self.assertEqual(answer.usage.prompt_tokens, 256)

    def test_dimensions_are_the_first_ones_at_length_1(self):
        whole = WHOLE[0]["vector"]
        short = self.embed(WHOLE[0]["text"], encoding_format="float", dimensions=64).data[0].embedding
        self.assertEqual(len(short), 64)
        self.assertGreaterEqual(cosine(short, whole[:64]), COSINE_MIN)
        self.assertAlmostEqual(sum(x * x for x in short), 1, places=5)
        with self.assertRaisesRegex(openai.BadRequestError, "384"):
            self.embed("x", dimensions=385)

    def test_a_large_batch_keeps_its_order(self):
        texts = [f"{i} {WHOLE[i % 5]['text']}" for i in range(500)]
        answer = self.embed(texts, encoding_format="float")
        self.assertEqual([item.index for item in answer.data], list(range(500)))
        for i in (0, 77, 499):
            alone = self.embed(texts[i], encoding_format="float").data[0].embedding
            self.assertEqual(answer.data[i].embedding, alone)

    def test_each_kind_of_model_says_what_it_does(self):
        kinds = {model.id: model.kind for model in self.client.models.list()}
        self.assertEqual((kinds["demo"], kinds[MODELS[0]], kinds[RANKER]), ("generate", "embed", "rank"))
        message = [{"role": "user", "content": "Hello"}]
        with self.assertRaisesRegex(openai.BadRequestError, "makes embeddings and writes no text"):
            self.client.chat.completions.create(model=MODELS[0], messages=message)
        with self.assertRaisesRegex(openai.BadRequestError, "makes embeddings and writes no text"):
            self.client.completions.create(model=MODELS[0], prompt="Hello")
        with self.assertRaisesRegex(openai.BadRequestError, "writes text and makes no embeddings"):
            self.embed("Hello", "demo")
        with self.assertRaisesRegex(openai.BadRequestError, "ask /v1/rerank"):
            self.embed("Hello", RANKER)

    def test_an_embedding_model_ranks_by_cosine(self):
        query, documents = CASES[3], WHOLE[:3] + WHOLE[4:5]
        body = {"model": MODELS[0], "query": query["text"], "documents": [d["text"] for d in documents]}
        status, answer = post("/v1/rerank", body)
        self.assertEqual(status, 200, answer)
        expected = [cosine(query["vector"], d["vector"]) for d in documents]
        found = {item["index"]: item["relevance_score"] for item in answer["results"]}
        for i, score in enumerate(expected):
            self.assertAlmostEqual(found[i], score, places=5)
        order = [item["index"] for item in answer["results"]]
        self.assertEqual(order, sorted(range(len(documents)), key=lambda i: -expected[i]))
        _, best = post("/rerank", {**body, "top_n": 1, "return_documents": True})
        self.assertEqual([item["document"]["text"] for item in best["results"]], [documents[order[0]]["text"]])

    def test_a_cross_encoder_scores_pairs(self):
        documents = ["the fish swims in the sea", {"text": "a red stone"}]
        status, answer = post("/rerank", {"model": RANKER, "query": "the big fish", "documents": documents})
        self.assertEqual(status, 200, answer)
        scores = [item["relevance_score"] for item in answer["results"]]
        self.assertEqual(scores, sorted(scores, reverse=True))
        self.assertTrue(all(0 < score < 1 for score in scores))
        status, refused = post("/rerank", {"model": "demo", "query": "a", "documents": ["b"]})
        self.assertEqual(status, 400, refused)

    def test_zz_a_killed_worker_is_a_pause(self):
        texts = [f"{i} {WHOLE[4]['text']}" for i in range(800)]
        killed = "minilm-3x1"
        before = self.embed(texts, killed, encoding_format="float")
        answers = []

        def ask():
            answers.append(self.embed(texts, killed, encoding_format="float"))

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.3)
        self.assertTrue(asking.is_alive(), "it was to be in the middle of its work")
        os.kill(int(os.environ["SHOAL_VICTIM"]), signal.SIGKILL)
        asking.join(60)
        self.assertEqual([item.embedding for item in answers[0].data], [item.embedding for item in before.data])


if __name__ == "__main__":
    unittest.main(verbosity=2)

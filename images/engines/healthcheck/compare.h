// The rule by which an answer is known again: docs/reference/replay.md has it in words.

#pragma once

#include "json.h"

#define MOST_QUESTIONS 32
#define MOST_TOKENS 1024

// What a model that does not chat answers with, in place of a text.
enum numbers { NONE, VECTOR, SCORES, LABELS, LABELS_OF_TOKENS };

enum verdict { UNANSWERED, EQUAL, EXPLAINED, DIFFERENT };

struct token {
    const struct json *text;
    size_t end;  // bytes of the answer up to and with this token
    double margin;
    double logprob, room;  // NaN if the set has none
};

struct question {
    const struct json *id, *path, *request, *answer;
    struct token tokens[MOST_TOKENS];
    int count;
    int has_logprobs, is_call;  // of every token
    enum numbers kind;
    const struct json *numbers;  // in place of an answer and its tokens
    double room;                 // how far they may move
};

struct outcome {
    enum verdict verdict;
    int token;         // the first that differs, of numbers the one that moved furthest; -1 for none
    double margin;     // of that token
    double drift;      // the largest difference of log-probabilities or numbers, of vectors 1 - cosine;
                       // NaN if none was compared
    double used;       // the largest part of a token's room that such a difference took
    const char *got;   // what came instead, `got_length` bytes; NULL if the token itself came
    size_t got_length;
    const char *why;   // why there is no answer
};

// Whether a text begins with a character that a terminal might obey.
int is_control(const char *text);

// Reads a question of the set; says what is wrong, or NULL if nothing is.
const char *read_question(const struct json *from, struct question *to);

// Holds a server's reply against a question.
struct outcome compare(const struct question *asked, const struct json *reply, double tolerance);

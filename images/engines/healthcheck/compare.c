#include "compare.h"

#include <math.h>
#include <string.h>

#define LONGEST_ID 256  // bytes
#define LARGEST_END 1048576
#define FURTHEST 1e6  // JSON has no word for infinity

static double number_or_nan(const struct json *object, const char *name) {
    const struct json *found = json_find(object, name, JSON_NUMBER);
    return found ? found->number : NAN;
}

// Of ASCII, or U+0080 to U+009F, which some terminals obey: text in UTF-8 that ends with a zero.
int is_control(const char *text) {
    const unsigned char *c = (const unsigned char *)text;
    return c[0] < 0x20 || c[0] == 0x7F || (c[0] == 0xC2 && c[1] < 0xA0);
}

static int is_printable(const struct json *text) {
    for (size_t i = 0; i < text->length; i++)
        if (is_control(text->text + i)) return 0;
    return 1;
}

static enum numbers numbers_at(const char *path) {
    static const char *const paths[] = {NULL, "/v1/embeddings", "/v1/rerank", "/classify", "/pooling"};
    for (enum numbers one = VECTOR; one <= LABELS_OF_TOKENS; one++)
        if (strcmp(path, paths[one]) == 0) return one;
    return NONE;
}

static const char *read_numbers(const struct json *from, struct question *to) {
    to->numbers = json_find(from, "numbers", JSON_LIST);
    to->room = number_or_nan(from, "room");
    if (!to->request || !to->numbers || !to->numbers->first) return "it lacks its request or its numbers";
    if (!(to->room > 0)) return "its numbers have no room";
    for (const struct json *one = to->numbers->first; one; one = one->next)
        if (one->kind != JSON_NUMBER) return "one of its numbers is none";
    return NULL;
}

const char *read_question(const struct json *from, struct question *to) {
    to->id = json_find(from, "id", JSON_STRING);
    to->path = json_find(from, "path", JSON_STRING);
    to->request = json_find(from, "request", JSON_OBJECT);
    to->answer = json_find(from, "answer", JSON_STRING);
    const struct json *tokens = json_find(from, "tokens", JSON_LIST);
    if (!to->id || !to->id->length || to->id->length > LONGEST_ID || !is_printable(to->id))
        return "its id is empty, too long or has control characters";
    to->kind = to->path ? numbers_at(to->path->text) : NONE;
    if (to->kind) return read_numbers(from, to);
    if (!to->path || (strcmp(to->path->text, "/v1/chat/completions") != 0 &&
                      strcmp(to->path->text, "/v1/completions") != 0))
        return "its path is none that is asked";
    if (!to->request || !to->answer || !tokens) return "it lacks its request, answer or tokens";
    const struct json *finish = json_find(from, "finish", JSON_STRING);
    to->is_call = finish && strcmp(finish->text, "tool_calls") == 0;
    to->count = 0;
    to->has_logprobs = 1;
    size_t before = 0;
    for (const struct json *one = tokens->first; one; one = one->next) {
        if (to->count == MOST_TOKENS) return "it has too many tokens";
        struct token *token = &to->tokens[to->count++];
        double end = number_or_nan(one, "end");
        token->text = json_find(one, "text", JSON_STRING);
        token->margin = number_or_nan(one, "margin");
        token->logprob = number_or_nan(one, "logprob");
        token->room = number_or_nan(one, "room");
        to->has_logprobs &= !isnan(token->logprob) && token->room >= 0;
        if (!token->text || !(token->margin >= 0)) return "a token lacks its text or its margin";
        if (!(end >= (double)before && end <= LARGEST_END)) return "a token ends before the one before it";
        before = token->end = (size_t)end;
    }
    if (!to->count || before != to->answer->length) return "its tokens do not make up its answer";
    return NULL;
}

// A server's tokens: a list of objects (chats, llama.cpp), or a list of texts and one of numbers.
struct given {
    const struct json *token, *logprob;
};

static struct given first_given(const struct json *choice) {
    const struct json *all = json_find(choice, "logprobs", JSON_OBJECT);
    const struct json *objects = json_find(all, "content", JSON_LIST);
    const struct json *texts = json_find(all, "tokens", JSON_LIST);
    const struct json *numbers = json_find(all, "token_logprobs", JSON_LIST);
    if (objects) return (struct given){.token = objects->first};
    return (struct given){.token = texts ? texts->first : NULL, .logprob = numbers ? numbers->first : NULL};
}

static struct given next_given(struct given one) {
    return (struct given){.token = one.token->next, .logprob = one.logprob ? one.logprob->next : NULL};
}

static const struct json *text_of(struct given one) {
    return one.token->kind == JSON_STRING ? one.token : json_find(one.token, "token", JSON_STRING);
}

static double logprob_of(struct given one) {
    if (one.logprob) return one.logprob->kind == JSON_NUMBER ? one.logprob->number : NAN;
    return number_or_nan(one.token, "logprob");
}

static int lists_tokens(struct given one) {
    if (!one.token) return 0;
    for (; one.token; one = next_given(one))
        if (!text_of(one) || isnan(logprob_of(one))) return 0;
    return 1;
}

static int is_same(const struct json *one, const struct json *other) {
    return one->length == other->length && memcmp(one->text, other->text, one->length) == 0;
}

static void differs_at(struct outcome *found, const struct question *asked, int token, double tolerance) {
    found->token = token < asked->count ? token : asked->count - 1;
    found->margin = asked->tokens[found->token].margin;
    found->verdict = found->margin <= tolerance ? EXPLAINED : DIFFERENT;
}

static void compare_tokens(struct outcome *found, const struct question *asked, struct given one,
                           double tolerance) {
    int i = 0;
    for (; one.token; one = next_given(one), i++) {
        const struct json *text = text_of(one);
        if (i == asked->count || !is_same(asked->tokens[i].text, text)) {
            found->got = text->text;
            found->got_length = text->length;
            return differs_at(found, asked, i, tolerance);
        }
        double room = asked->tokens[i].room;
        double drift = fmin(fabs(logprob_of(one) - asked->tokens[i].logprob), FURTHEST);
        if (!(found->drift >= drift)) found->drift = drift;
        if (room > 0) found->used = fmin(fmax(found->used, drift / room), FURTHEST);
        if (drift > room) {
            found->verdict = DIFFERENT;
            found->token = i;
            found->margin = asked->tokens[i].margin;
            found->drift = drift;
            return;
        }
    }
    if (i == asked->count) return;
    found->got = "";
    differs_at(found, asked, i, tolerance);
}

// The first byte that differs belongs to a token.
static void compare_texts(struct outcome *found, const struct question *asked, const struct json *text,
                          double tolerance) {
    const struct json *wanted = asked->answer;
    size_t at = 0;
    while (at < text->length && at < wanted->length && text->text[at] == wanted->text[at]) at++;
    if (at == text->length && at == wanted->length) return;
    int token = 0;
    while (token < asked->count && asked->tokens[token].end <= at) token++;
    while (at && (text->text[at] & 0xC0) == 0x80) at--;  // to the character that differs
    found->got = text->text + at;
    found->got_length = text->length - at;
    differs_at(found, asked, token, tolerance);
}

// The numbers of an answer, one after the other.
struct numbers_given {
    const struct json *list, *one;  // a list of lists, if there is one; the number
};

static const struct json *first_in(const struct json *list) {
    return list && list->kind == JSON_LIST ? list->first : NULL;
}

// Goes on to the next list that is not empty, if this one has come to its end.
static struct numbers_given in_list(struct numbers_given now) {
    while (!now.one && now.list) now.one = first_in(now.list = now.list->next);
    return now;
}

static struct numbers_given first_number(const struct question *asked, const struct json *reply) {
    const struct json *data = json_find(reply, "data", JSON_LIST);
    const struct json *row = data && data->first && !data->first->next ? data->first : NULL;
    static const char *const names[] = {"", "embedding", "", "probs", "data"};
    const struct json *list = json_find(row, names[asked->kind], JSON_LIST);
    if (!list) return (struct numbers_given){0};
    if (asked->kind != LABELS_OF_TOKENS) return (struct numbers_given){.one = list->first};
    return in_list((struct numbers_given){.list = list->first, .one = first_in(list->first)});
}

static struct numbers_given next_number(struct numbers_given now) {
    now.one = now.one->next;
    return in_list(now);
}

// The score of a document, by its place among those that were asked about.
static double score_of(const struct json *reply, int place) {
    const struct json *rows = json_find(reply, "results", JSON_LIST);
    for (const struct json *row = rows ? rows->first : NULL; row; row = row->next)
        if (number_or_nan(row, "index") == place) return number_or_nan(row, "relevance_score");
    return NAN;
}

static struct outcome unanswered(const char *why) {
    return (struct outcome){.verdict = UNANSWERED, .token = -1, .margin = NAN, .drift = NAN, .why = why};
}

static struct outcome compare_numbers(const struct question *asked, const struct json *reply) {
    struct outcome found = {.verdict = EQUAL, .token = -1, .margin = NAN, .drift = 0};
    long double own = 0, other = 0, both = 0;  // whose squares have room in it
    double furthest = -1;
    int place = 0, at = 0, by_place = asked->kind == SCORES;
    struct numbers_given given = by_place ? (struct numbers_given){0} : first_number(asked, reply);
    for (const struct json *one = asked->numbers->first; one; one = one->next, place++) {
        double number = by_place ? score_of(reply, place) : NAN;
        if (!by_place && given.one && given.one->kind == JSON_NUMBER) {
            number = given.one->number;
            given = next_number(given);
        }
        if (isnan(number)) {
            if (!place) return unanswered("its reply has no numbers of the kind that was asked for");
            found.drift = INFINITY;  // fewer than there were
            break;
        }
        double moved = fabs(number - one->number);
        if (moved > furthest) {
            furthest = moved;
            at = place;
        }
        own += (long double)one->number * one->number;
        other += (long double)number * number;
        both += (long double)number * one->number;
    }
    if (given.one || (by_place && !isnan(score_of(reply, place)))) found.drift = INFINITY;
    if (asked->kind == VECTOR && !isinf(found.drift))
        found.drift = own > 0 && other > 0 ? fmax(0, (double)(1 - both / (sqrtl(own) * sqrtl(other)))) : INFINITY;
    else if (!isinf(found.drift)) found.drift = furthest;
    found.drift = fmin(found.drift, FURTHEST);
    found.used = fmin(found.drift / asked->room, FURTHEST);
    if (found.drift > asked->room) {
        found.verdict = DIFFERENT;
        found.token = at;
    }
    return found;
}

struct outcome compare(const struct question *asked, const struct json *reply, double tolerance) {
    if (asked->kind) return compare_numbers(asked, reply);
    struct outcome found = {.verdict = EQUAL, .token = -1, .margin = NAN, .drift = NAN};
    const struct json *choices = json_find(reply, "choices", JSON_LIST);
    const struct json *choice = choices ? choices->first : NULL;
    const struct json *message = json_find(choice, "message", JSON_OBJECT);
    const struct json *text = message ? json_get(message, "content") : json_get(choice, "text");
    static const struct json nothing = {.kind = JSON_STRING, .text = ""};
    if (message && (!text || text->kind == JSON_NULL)) text = &nothing;  // all in a call, or in thoughts
    if (!text || text->kind != JSON_STRING) {
        found.verdict = UNANSWERED;
        found.why = "its reply has no text";
        return found;
    }
    struct given tokens = first_given(choice);
    if (asked->has_logprobs && lists_tokens(tokens)) compare_tokens(&found, asked, tokens, tolerance);
    else if (!asked->is_call) compare_texts(&found, asked, text, tolerance);
    else {  // which the server takes out of the text
        found.verdict = UNANSWERED;
        found.why = "it is answered by a call of a tool, and the server lists no tokens";
    }
    return found;
}

// Asks the server in this container whether it serves, and with --replay whether it answers as the
// image did when it was tested: usage() has the flags, docs/reference/replay.md the rule.
//
// It reaches 127.0.0.1 alone, and ends within --seconds. What it finds is kept in a file, bound to
// the socket on which the server listens: it asks each question once per start of the server, and
// goes on where a call before it ran out of time.

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "compare.h"
#include "http.h"
#include "json.h"
#ifdef WEIGHTS
#include "weights.h"
#endif

enum { HEALTHY = 0, NOT_SHOWN = 1, USAGE = 2, NO_SET = 3 };
#define LARGEST_SET (1u << 20)
#define LARGEST_RESULT (1u << 20)
#define LONGEST_SHOWN 80
#define LARGEST_BYTES 9007199254740992  // up to which a double has each whole number
#define LISTS_MODELS 5  // seconds

static const char *const VERDICTS[] = {"unanswered", "equal", "explained", "different"};

struct options {
    int replay, wait, if_any, show, port;
    double seconds;
    const char *set, *health, *result, *key;
#ifdef WEIGHTS
    const char *weights;
#endif
};

struct set {
    double tolerance, weight_bytes;  // 0 if the tested image's server did not say how many
    int count;
    char digest[17];  // FNV-1a of the file: not against attackers, who could not change the image
    struct question questions[MOST_QUESTIONS];
};

// What is known of each question: its line of the result, or NULL.
struct results {
    char server[256];
    double weight_bytes;  // of the server's model, as it says; 0 if it does not
    char *lines[MOST_QUESTIONS];
    enum verdict verdicts[MOST_QUESTIONS];
    int parted[MOST_QUESTIONS];  // the first token that differs, if there is one
#ifdef WEIGHTS
    char weights[2048];  // "equal", or what is another's; empty if nobody looked, or not to the end
    struct weights_read read;
#endif
};

static struct set set;
static struct results results;

static int complain(int code, const char *format, ...) {
    va_list words;
    va_start(words, format);
    vfprintf(stderr, format, words);
    va_end(words);
    fputc('\n', stderr);
    return code;
}

static int usage(void) {
    return complain(
        USAGE,
        "usage: healthcheck --port N [--port-variable NAME] [--health PATH] [--seconds N] [--wait]\n"
        "                   [--key-variable NAME] [--replay] [--if-any] [--set FILE] [--result FILE]\n"
        "       healthcheck --show [--result FILE]\n"
        "exit codes: 0 it serves, and answers as it was tested; 1 not, or not yet; 2 wrong usage;\n"
        "3 no set of questions here that could be asked\n"
        "  --port N             of the server, on 127.0.0.1\n"
        "  --port-variable NAME the variable that moves the server to another port, if it is set\n"
        "  --health PATH        answers 200 when the model is loaded (/health)\n"
        "  --seconds N          this call's time, 1 to 86400 (5; with --replay 50)\n"
        "  --wait               wait until the model is loaded, within that time\n"
        "  --key-variable NAME  the variable with the server's password, if it is set\n"
        "  --replay             ask the questions of --set (/etc/weightsmith/replay.json), once for\n"
        "                       each start of the server, and keep what comes out in --result\n"
        "                       (/tmp/replay.json)\n"
        "  --if-any             where there is no file --set, it is enough to serve\n"
#ifdef WEIGHTS
        "  --weights FILE       with --replay, the files of weights that there must be, if there is\n"
        "                       such a list (/etc/weightsmith/weights.json)\n"
#endif
        "  --show               print what was kept in --result, in images that have no cat");
}

static void too_late(int signal_number) {
    (void)signal_number;
    _exit(NOT_SHOWN);
}

// A file's bytes; NULL if it is missing, no plain file, larger than that, or not ours if it must be.
static char *read_file(const char *path, size_t largest, int must_be_ours, size_t *length) {
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | (must_be_ours ? O_NOFOLLOW : 0));
    struct stat status;
    char *data = NULL;
    if (file < 0) return NULL;
    if (fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_size <= (off_t)largest &&
        (!must_be_ours || status.st_uid == geteuid()) && (data = malloc((size_t)status.st_size + 1))) {
        size_t there = 0, size = (size_t)status.st_size;
        ssize_t got = 1;
        while (there < size && (got = read(file, data + there, size - there)) > 0) there += (size_t)got;
        if (there < size) {
            free(data);
            data = NULL;
        } else {
            data[size] = 0;
            *length = size;
        }
    }
    close(file);
    return data;
}

// Writes a text in quotes, as JSON has it; without `length` to a terminal's line, cut short.
static void write_text(FILE *out, const char *text, size_t length, size_t most) {
    fputc('"', out);
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)text[i];
        if (i >= most && (c & 0xC0) != 0x80) {
            fputs("…", out);
            break;
        }
        if (c == '"' || c == '\\') fprintf(out, "\\%c", c);
        else if (is_control(text + i)) fprintf(out, "\\u%04x", c < 0x80 ? c : (unsigned char)text[++i]);
        else fputc(c, out);
    }
    fputc('"', out);
}

// A member that is a number of bytes; 0 if there is none.
static double bytes_in(const struct json *object, const char *name) {
    const struct json *found = json_find(object, name, JSON_NUMBER);
    return found && found->number >= 1 && found->number <= LARGEST_BYTES ? floor(found->number) : 0;
}

static int read_set(const char *path) {
    size_t length = 0;
    char *data = read_file(path, LARGEST_SET, 0, &length);
    if (!data) return complain(NO_SET, "no replay set: %s is missing or larger than 1 MiB", path);
    const struct json *whole = json_read(data, length);
    const struct json *version = json_find(whole, "version", JSON_NUMBER);
    const struct json *tolerance = json_find(whole, "tolerance", JSON_NUMBER);
    const struct json *questions = json_find(whole, "questions", JSON_LIST);
    if (!whole) return complain(NO_SET, "%s is no replay set: it is not JSON", path);
    if (!version || (version->number != 1 && version->number != 2))
        return complain(NO_SET, "%s is no replay set of version 1 or 2", path);
    if (!questions && json_get(whole, "digests"))
        return complain(NO_SET, "%s has digests of questions alone, so nothing can be asked", path);
    if (!questions || !tolerance || !(tolerance->number >= 0 && tolerance->number <= 10))
        return complain(NO_SET, "%s is no replay set: it lacks its questions or its tolerance", path);
    set.tolerance = tolerance->number;
    set.weight_bytes = bytes_in(whole, "weight_bytes");
    for (const struct json *one = questions->first; one; one = one->next) {
        if (set.count == MOST_QUESTIONS)
            return complain(NO_SET, "%s is no replay set: it has more than %d questions", path, MOST_QUESTIONS);
        const char *wrong = read_question(one, &set.questions[set.count]);
        if (wrong) return complain(NO_SET, "%s is no replay set: questions[%d]: %s", path, set.count, wrong);
        for (int i = 0; i < set.count; i++)
            if (strcmp(set.questions[i].id->text, set.questions[set.count].id->text) == 0)
                return complain(NO_SET, "%s is no replay set: it has an id twice", path);
        set.count++;
    }
    if (!set.count) return complain(NO_SET, "%s is no replay set: it has no question", path);
    unsigned long long sum = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < length; i++) sum = (sum ^ (unsigned char)data[i]) * 0x100000001b3ull;
    snprintf(set.digest, sizeof set.digest, "%016llx", sum);
    return 0;
}

#ifdef WEIGHTS
static const struct json *weights;  // NULL without a list

static int read_list(const char *path) {
    size_t length = 0;
    if (access(path, F_OK) != 0 && errno == ENOENT) return 0;
    char *data = read_file(path, LARGEST_SET, 0, &length);
    if (!data) return complain(NO_SET, "no list of weights: %s cannot be read, or is larger than 1 MiB", path);
    weights = json_read(data, length);
    const char *wrong = weights ? read_weights(weights) : "it is not JSON";
    return wrong ? complain(NO_SET, "%s is no list of weights: %s", path, wrong) : 0;
}

// Takes over how far an earlier call has read the weights, if it says so in full.
static void recall_reading(const struct json *read) {
    const struct json *bytes = json_find(read, "bytes", JSON_NUMBER);
    const struct json *words = json_find(read, "words", JSON_STRING);
    uint32_t *to = results.read.words;
    int length = 0;
    if (!bytes || !(bytes->number >= 0 && bytes->number <= LARGEST_BYTES) || !words) return;
    if (sscanf(words->text, "%8x%8x%8x%8x%8x%8x%8x%8x%n", to, to + 1, to + 2, to + 3, to + 4, to + 5, to + 6,
               to + 7, &length) == 8 && length == 64 && words->length == 64)
        results.read.bytes = bytes->number;
}

// Compares files as far as the time goes; 0 if it was not enough.
static int compare_weights(double until) {
    if (!results.read.bytes && find_other_weights(weights, results.weights, sizeof results.weights)) return 1;
    if (!read_weights_on(weights, &results.read, until, results.weights, sizeof results.weights)) return 0;
    if (!results.weights[0]) strcpy(results.weights, "equal");
    return 1;
}

static int has_other_weights(void) { return results.weights[0] && strcmp(results.weights, "equal") != 0; }
#else
#define has_other_weights() 0
#endif

// Adds the numbers of the sockets that listen on a port; 0 if the kernel does not say.
static void add_sockets(const char *table, int port, unsigned long *sum, int *found) {
    FILE *rows = fopen(table, "re");
    char line[512];
    while (rows && fgets(line, sizeof line, rows)) {
        unsigned at, state;
        unsigned long number;
        if (sscanf(line, " %*d: %*[0-9A-Fa-f]:%x %*[0-9A-Fa-f]:%*x %x %*x:%*x %*x:%*x %*x %*u %*u %lu",
                   &at, &state, &number) == 3 &&
            at == (unsigned)port && state == 0x0A && number) {
            *sum += number * number;  // in whatever order they come
            ++*found;
        }
    }
    if (rows) fclose(rows);
}

// Names this start of the server: a socket's number is never used again until the next boot.
static void name_server(int port, char *name, size_t size) {
    unsigned long sum = 0;
    int found = 0;
    size_t length = 0;
    char boot[64] = "";
    add_sockets("/proc/net/tcp", port, &sum, &found);
    add_sockets("/proc/net/tcp6", port, &sum, &found);
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (file && fgets(boot, sizeof boot, file)) length = strspn(boot, "0123456789abcdef-");
    if (file) fclose(file);
    boot[length] = 0;
    name[0] = 0;
    if (found && length) snprintf(name, size, "%s/%d:%d:%lx/%s", boot, port, found, sum, set.digest);
}

// Takes over what an earlier call found, if it asked this start of the server this very set.
static void recall(const char *path) {
    size_t length = 0;
    char *data = results.server[0] ? read_file(path, LARGEST_RESULT, 1, &length) : NULL;
    const struct json *whole = data ? json_read(data, length) : NULL;
    const struct json *server = json_find(whole, "server", JSON_STRING);
    const struct json *rows = json_find(whole, "questions", JSON_LIST);
    if (!server || !rows || strcmp(server->text, results.server) != 0) return;
    results.weight_bytes = bytes_in(whole, "weight_bytes");
#ifdef WEIGHTS
    const struct json *said = json_find(whole, "weights", JSON_STRING);
    if (said) snprintf(results.weights, sizeof results.weights, "%s", said->text);
    recall_reading(json_find(whole, "weights_read", JSON_OBJECT));
#endif
    int i = 0;
    for (const struct json *row = rows->first; row && i < set.count; row = row->next, i++) {
        const struct json *id = json_find(row, "id", JSON_STRING);
        const struct json *verdict = json_find(row, "verdict", JSON_STRING);
        if (!id || !verdict || strcmp(id->text, set.questions[i].id->text) != 0) continue;
        for (enum verdict one = EQUAL; one <= DIFFERENT; one++)
            if (strcmp(verdict->text, VERDICTS[one]) == 0) {
                const struct json *token = json_find(row, "token", JSON_NUMBER);
                results.verdicts[i] = one;
                int is_place = token && token->number >= 1 && token->number <= MOST_TOKENS;
                results.parted[i] = is_place ? (int)token->number - 1 : -1;
                results.lines[i] = strndup(row->source, row->source_length);
            }
    }
}

static int count(enum verdict verdict) {
    int found = 0;
    for (int i = 0; i < set.count; i++) found += results.verdicts[i] == verdict;
    return found;
}

// Whether another token in the place of one that came would have been a fault: else any model might
// answer so.
static int is_decided(void) {
    for (int i = 0; i < set.count; i++) {
        const struct question *asked = &set.questions[i];
        if (asked->kind && results.verdicts[i] == EQUAL) return 1;
        if (results.verdicts[i] != EQUAL && results.verdicts[i] != EXPLAINED) continue;
        int came = results.verdicts[i] == EQUAL ? asked->count : results.parted[i];
        for (int token = 0; token < came && token < asked->count; token++)
            if (asked->tokens[token].margin > set.tolerance) return 1;
    }
    return 0;
}

static int is_resized(void) {
    return set.weight_bytes && results.weight_bytes && results.weight_bytes != set.weight_bytes;
}

static const char *verdict_now(void) {
    if (count(DIFFERENT) || is_resized() || has_other_weights()) return "different";
    return count(UNANSWERED) || !is_decided() ? "not shown" : "proven";
}

// Writes what is known so far; half a file is never seen.
static void keep(const char *path) {
    char partial[PATH_MAX];
    if (snprintf(partial, sizeof partial, "%s.%ld", path, (long)getpid()) >= (int)sizeof partial) return;
    int file = open(partial, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0644);
    FILE *out = file < 0 ? NULL : fdopen(file, "w");
    if (!out) {
        complain(0, "cannot write %s: %s; the next call asks again", path, strerror(errno));
        return;
    }
    fprintf(out, "{\"version\": 1, \"verdict\": \"%s\", \"server\": \"%s\", \"tolerance\": %.17g",
            verdict_now(), results.server, set.tolerance);
    for (enum verdict one = UNANSWERED; one <= DIFFERENT; one++)
        fprintf(out, ", \"%s\": %d", VERDICTS[one], count(one));
    if (results.weight_bytes) fprintf(out, ", \"weight_bytes\": %.0f", results.weight_bytes);
#ifdef WEIGHTS
    if (results.weights[0]) {
        fputs(", \"weights\": ", out);
        write_text(out, results.weights, strlen(results.weights), SIZE_MAX);
    } else if (results.read.bytes) {
        fprintf(out, ", \"weights_read\": {\"bytes\": %.0f, \"words\": \"", results.read.bytes);
        for (int i = 0; i < 8; i++) fprintf(out, "%08x", results.read.words[i]);
        fputs("\"}", out);
    }
#endif
    fputs(", \"questions\": [", out);
    for (int i = 0; i < set.count; i++) {
        fputs(i ? ",\n " : "\n ", out);
        if (results.lines[i]) fputs(results.lines[i], out);
        else {
            fputs("{\"id\": ", out);
            write_text(out, set.questions[i].id->text, set.questions[i].id->length, SIZE_MAX);
            fputs(", \"verdict\": \"unanswered\"}", out);
        }
    }
    fputs("\n]}\n", out);
    int whole = !ferror(out);
    if (fclose(out) != 0 || !whole || rename(partial, path) != 0) {
        complain(0, "cannot write %s: %s; the next call asks again", path, strerror(errno));
        unlink(partial);
    }
}

static void say(const struct question *asked, const struct outcome *found) {
    const struct token *token = &asked->tokens[found->token];
    fputs("different: question ", stderr);
    write_text(stderr, asked->id->text, asked->id->length, LONGEST_SHOWN);
    if (asked->kind) {
        fprintf(stderr, ": its numbers are off by %.3g, above %.3g\n", found->drift, asked->room);
        return;
    }
    fprintf(stderr, ", token %d: ", found->token + 1);
    write_text(stderr, token->text->text, token->text->length, LONGEST_SHOWN);
    if (found->got) {
        fputs(" was expected, and came ", stderr);
        write_text(stderr, found->got, found->got_length, LONGEST_SHOWN);
        fprintf(stderr, "; its margin of %.3g is above %.3g\n", token->margin, set.tolerance);
    } else {
        fprintf(stderr, " came with a log-probability that is off by %.3g, above %.3g\n", found->drift,
                token->room);
    }
}

static char *line_of(const struct question *asked, const struct outcome *found, double seconds) {
    char *line = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&line, &size);
    if (!out) return NULL;
    fputs("{\"id\": ", out);
    write_text(out, asked->id->text, asked->id->length, SIZE_MAX);
    fprintf(out, ", \"verdict\": \"%s\", \"seconds\": %.3f", VERDICTS[found->verdict], seconds);
    if (asked->kind) {
        fprintf(out, ", \"difference\": %.6g, \"room_used\": %.4g", found->drift, found->used);
        if (found->token >= 0) fprintf(out, ", \"number\": %d", found->token + 1);
    } else if (!isnan(found->drift))
        fprintf(out, ", \"logprob_difference\": %.6g, \"room_used\": %.4g", found->drift, found->used);
    if (!asked->kind && found->token >= 0) {
        const struct json *text = asked->tokens[found->token].text;
        fprintf(out, ", \"token\": %d, \"margin\": %.6g, \"expected\": ", found->token + 1, found->margin);
        write_text(out, text->text, text->length, SIZE_MAX);
        if (found->got) {
            fputs(", \"got\": ", out);
            write_text(out, found->got, found->got_length, LONGEST_SHOWN);
        }
    }
    fputc('}', out);
    return fclose(out) == 0 ? line : NULL;
}

static void pause_before(double until) {
    struct timespec pause = {.tv_nsec = 250000000};
    if (now() + 0.25 < until) nanosleep(&pause, NULL);
}

// Waits while the server is busy or still starts (429, 503), until the time is up.
static struct outcome ask(const struct options *options, const struct question *asked, double until) {
    struct reply reply;
    static char busy[32];
    static struct json *body;  // which the outcome points into
    json_free(body);
    body = NULL;
    for (;;) {
        reply = http_ask(options->port, asked->path->text, options->key, asked->request->source,
                         asked->request->source_length, until);
        if ((reply.status != 429 && reply.status != 503) || now() + 0.25 >= until) break;
        pause_before(until);
    }
    if (reply.status == 200) {
        body = json_read(reply.body, reply.length);
        if (body) return compare(asked, body, set.tolerance);
        reply.why = "its reply is not JSON";
    } else if (reply.status) {
        snprintf(busy, sizeof busy, "it answered %d", reply.status);
        reply.why = busy;
    }
    return (struct outcome){.verdict = UNANSWERED, .token = -1, .margin = NAN, .drift = NAN, .why = reply.why};
}

// The bytes of its model's tensors as the server lists them, which llama.cpp does; 0 if it does not.
static double listed_bytes(const struct options *options, double until) {
    struct reply reply = http_ask(options->port, "/v1/models", options->key, NULL, 0,
                                  fmin(until, now() + LISTS_MODELS));
    struct json *body = reply.status == 200 ? json_read(reply.body, reply.length) : NULL;
    const struct json *rows = json_find(body, "data", JSON_LIST);
    double bytes = 0;
    for (const struct json *row = rows ? rows->first : NULL; row && !bytes; row = row->next)
        bytes = bytes_in(json_find(row, "meta", JSON_OBJECT), "size");
    json_free(body);
    return bytes;
}

static int replay(const struct options *options, double until) {
    name_server(options->port, results.server, sizeof results.server);
    recall(options->result);
#ifdef WEIGHTS
    if (weights && !results.weights[0]) {
        int known = compare_weights(until);
        keep(options->result);
        if (!known)
            return complain(NOT_SHOWN, "not shown: %.1f of %.1f GB of weights are read; the next call reads on",
                            results.read.bytes / 1e9, bytes_to_read(weights) / 1e9);
    }
    if (has_other_weights())
        return complain(NOT_SHOWN, "different: %s; see %s", results.weights, options->result);
#endif
    int remembered = set.count - count(UNANSWERED);
    if (set.weight_bytes && remembered < set.count) results.weight_bytes = listed_bytes(options, until);
    for (int i = 0; i < set.count; i++) {
        const struct question *asked = &set.questions[i];
        if (results.verdicts[i] != UNANSWERED) continue;
        double began = now();
        struct outcome found = ask(options, asked, until);
        if (found.verdict == UNANSWERED) {
            keep(options->result);
            return complain(NOT_SHOWN, "not shown: %d of %d questions are answered; question %s: %s", i,
                            set.count, asked->id->text, found.why);
        }
        results.verdicts[i] = found.verdict;
        results.parted[i] = found.token;
        results.lines[i] = line_of(asked, &found, now() - began);
        if (found.verdict == DIFFERENT) say(asked, &found);
        keep(options->result);
    }
    const char *again = remembered == set.count ? ", as this start of the server was asked before" : "";
    if (count(DIFFERENT))
        return complain(NOT_SHOWN, "different: %d of %d answers are not those of the tested image%s; see %s",
                        count(DIFFERENT), set.count, again, options->result);
    if (is_resized())
        return complain(NOT_SHOWN, "different: the server has %.0f bytes of weights and the tested image had "
                        "%.0f%s; see %s", results.weight_bytes, set.weight_bytes, again, options->result);
    if (!is_decided())
        return complain(NOT_SHOWN, "not shown: of no token that came was the tested image sure, so any model "
                        "might answer so%s; see %s", again, options->result);
    fprintf(stderr, "proven: %d of %d answers are equal, %d differ where rounding may%s\n", count(EQUAL),
            set.count, count(EXPLAINED), again);
    return HEALTHY;
}

static int is_ready(const struct options *options, double until) {
    double patience = until;
    for (;;) {
        struct reply reply = http_ask(options->port, options->health, NULL, NULL, 0, patience);
        if (reply.status == 200) return 1;
        if (!options->wait || now() + 0.25 >= until) {
            if (reply.status) complain(0, "not ready: the health endpoint answered %d", reply.status);
            else complain(0, "not ready: %s", reply.why);
            return 0;
        }
        pause_before(until);
    }
}

// A number of at most six digits, -1 for another text.
static int whole_number(const char *text) {
    size_t digits = strspn(text, "0123456789");
    return digits && digits <= 6 && !text[digits] ? atoi(text) : -1;
}

static int read_options(int argc, char **argv, struct options *options) {
    enum { REPLAY, IF_ANY, SHOW, SET, PORT, MOVED, HEALTH, SECONDS, WAIT, RESULT, KEY, WEIGHT_FILES };
    static const struct option known[] = {
        {"replay", no_argument, NULL, REPLAY},        {"set", required_argument, NULL, SET},
        {"port", required_argument, NULL, PORT},      {"health", required_argument, NULL, HEALTH},
        {"seconds", required_argument, NULL, SECONDS}, {"wait", no_argument, NULL, WAIT},
        {"result", required_argument, NULL, RESULT},  {"key-variable", required_argument, NULL, KEY},
        {"if-any", no_argument, NULL, IF_ANY},        {"port-variable", required_argument, NULL, MOVED},
        {"show", no_argument, NULL, SHOW},
#ifdef WEIGHTS
        {"weights", required_argument, NULL, WEIGHT_FILES},
#endif
        {NULL, 0, NULL, 0},
    };
    const char *key = NULL, *moved = NULL;
    int found;
    opterr = 0;
    while ((found = getopt_long(argc, argv, "", known, NULL)) >= 0) {
        switch (found) {
        case REPLAY: options->replay = 1; break;
        case WAIT: options->wait = 1; break;
        case IF_ANY: options->if_any = 1; break;
        case SHOW: options->show = 1; break;
        case SET: options->set = optarg; break;
#ifdef WEIGHTS
        case WEIGHT_FILES: options->weights = optarg; break;
#endif
        case HEALTH: options->health = optarg; break;
        case RESULT: options->result = optarg; break;
        case KEY: key = optarg; break;
        case MOVED: moved = optarg; break;
        case PORT: options->port = whole_number(optarg); break;
        case SECONDS: options->seconds = whole_number(optarg); break;
        default: return 0;
        }
    }
    const char *elsewhere = moved ? getenv(moved) : NULL;
    if (elsewhere && *elsewhere) options->port = whole_number(elsewhere);
    if (!options->seconds) options->seconds = options->replay ? 50 : 5;
    const char *secret = key ? getenv(key) : NULL;
    options->key = secret && *secret ? secret : NULL;
    for (const char *c = options->key; c && *c; c++)
        if (*c < 0x20 || *c > 0x7E) return 0;
    for (const char *c = options->health; *c; c++)
        if (*c < 0x21 || *c > 0x7E) return 0;
    if (options->show) return optind == argc;
    return optind == argc && options->port > 0 && options->port < 65536 && options->health[0] == '/' &&
           options->seconds >= 1 && options->seconds <= 86400;
}

static int show(const char *path) {
    size_t length = 0;
    char *data = read_file(path, LARGEST_RESULT, 1, &length);
    if (!data) return complain(NOT_SHOWN, "no result: %s is missing, or not of this user", path);
    return fwrite(data, 1, length, stdout) == length && fflush(stdout) == 0 ? HEALTHY : NOT_SHOWN;
}

int main(int argc, char **argv) {
    struct options options = {.set = "/etc/weightsmith/replay.json", .health = "/health",
                              .result = "/tmp/replay.json"};
#ifdef WEIGHTS
    options.weights = "/etc/weightsmith/weights.json";
#endif
    if (!read_options(argc, argv, &options)) return usage();
    if (options.show) return show(options.result);
    signal(SIGALRM, too_late);
    alarm((unsigned)options.seconds + 2);  // whatever happens below, it ends
    double until = now() + options.seconds;
    if (options.if_any && access(options.set, F_OK) != 0 && errno == ENOENT) options.replay = 0;
    int problem = options.replay ? read_set(options.set) : 0;
#ifdef WEIGHTS
    if (options.replay && !problem) problem = read_list(options.weights);
#endif
    if (problem) return problem;
    if (!is_ready(&options, until)) return NOT_SHOWN;
    return options.replay ? replay(&options, until) : HEALTHY;
}

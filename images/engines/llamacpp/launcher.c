// Starts the build of a program that suits the CPU it runs on.
//
// Beside this file stands the folder cpu/ with one folder per CPU variant, each holding a program of
// this file's own name. The best variant that the CPU can run is executed in place of this process,
// with the same arguments and environment. WEIGHTSMITH_CPU_VARIANT names one to use instead.
// Exit codes of the launcher itself: 2 for a variant that is not there, 5 for a CPU that is too old.

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

#define USAGE 2
#define ENVIRONMENT 5

struct variant {
    const char *name;
    int (*runs_here)(void);
    const char *needs;
};

#if defined(__x86_64__)
#include <cpuid.h>

#define BIT(n) (1u << (n))

static int has(unsigned value, unsigned wanted) { return (value & wanted) == wanted; }

// The register state that the operating system saves: AVX and AVX-512 need more than the CPU.
static unsigned saved_state(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, BIT(27))) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static int runs_v2(void) {
    unsigned a, b, c, d;
    // SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT; then LAHF/SAHF.
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    if (!has(c, BIT(0) | BIT(9) | BIT(13) | BIT(19) | BIT(20) | BIT(23))) return 0;
    return __get_cpuid(0x80000001, &a, &b, &c, &d) && has(c, BIT(0));
}

static int runs_v3(void) {
    unsigned a, b, c, d;
    if (!runs_v2() || !has(saved_state(), BIT(1) | BIT(2))) return 0;
    // FMA, MOVBE, AVX, F16C; then BMI1, AVX2, BMI2; then LZCNT.
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, BIT(12) | BIT(22) | BIT(28) | BIT(29))) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(b, BIT(3) | BIT(5) | BIT(8))) return 0;
    return __get_cpuid(0x80000001, &a, &b, &c, &d) && has(c, BIT(5));
}

static int runs_v4(void) {
    unsigned a, b, c, d;
    if (!runs_v3() || !has(saved_state(), BIT(5) | BIT(6) | BIT(7))) return 0;
    // AVX-512 F, DQ, CD, BW, VL.
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return has(b, BIT(16) | BIT(17) | BIT(28) | BIT(30) | BIT(31));
}

static int runs_v4_vnni(void) {
    unsigned a, b, c, d;
    return runs_v4() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && has(c, BIT(11));
}

static const struct variant VARIANTS[] = {
    {"x86-64-v4-vnni", runs_v4_vnni, "AVX-512 with VNNI"},
    {"x86-64-v4", runs_v4, "AVX-512 (F, CD, VL, DQ, BW)"},
    {"x86-64-v3", runs_v3, "AVX2, FMA, F16C and BMI2"},
    {"x86-64-v2", runs_v2, "SSE4.2 and POPCNT (CPUs from about 2009 on)"},
};

#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/prctl.h>

static int runs_base(void) { return 1; }

static int has(unsigned long kind, unsigned long wanted) {
    return (getauxval(kind) & wanted) == wanted;
}

static int runs_dotprod(void) {
    // What Armv8.1 and 8.2 always have and compilers use; then half precision, dot product.
    return has(AT_HWCAP, HWCAP_ATOMICS | HWCAP_ASIMDRDM | HWCAP_CRC32 | HWCAP_FPHP |
                             HWCAP_ASIMDHP | HWCAP_ASIMDDP);
}

static int runs_i8mm(void) { return runs_dotprod() && has(AT_HWCAP2, HWCAP2_I8MM); }

static int runs_sve(void) {
    if (!runs_i8mm() || !has(AT_HWCAP, HWCAP_SVE)) return 0;
    // llama.cpp computes nothing with vectors of other lengths, and does not say so.
    int length = prctl(PR_SVE_GET_VL) & PR_SVE_VL_LEN_MASK;
    return length == 16 || length == 32 || length == 64;
}

static const struct variant VARIANTS[] = {
    {"armv8.2-a-i8mm-sve", runs_sve, "SVE vectors of 128, 256 or 512 bits and I8MM"},
    {"armv8.2-a-i8mm", runs_i8mm, "the 8-bit matrix instructions (I8MM)"},
    {"armv8.2-a-dotprod", runs_dotprod, "the dot product and half precision instructions"},
    {"armv8-a", runs_base, "a 64-bit Arm CPU"},
};

#else
#error "weightsmith builds llama.cpp for x86_64 and aarch64 only"
#endif

#define COUNT (sizeof VARIANTS / sizeof VARIANTS[0])

// Where this program lies; in a container without /proc, the path it was started by.
static int own_path(char *path, size_t size) {
    ssize_t length = readlink("/proc/self/exe", path, size - 1);
    if (length > 0) {
        path[length] = 0;
        return 1;
    }
    const char *started = (const char *)getauxval(AT_EXECFN);
    return started && snprintf(path, size, "%s", started) < (int)size;
}

static int variant_path(char *out, size_t size, const char *own, const char *variant) {
    const char *slash = strrchr(own, '/');
    int folder = slash ? (int)(slash - own) : 1;
    const char *name = slash ? slash + 1 : own;
    int n = snprintf(out, size, "%.*s/cpu/%s/%s", folder, slash ? own : ".", variant, name);
    return n > 0 && (size_t)n < size;
}

static int start(char *target, char **argv) {
    execv(target, argv);
    fprintf(stderr, "error: cannot start %s: %s\n", target, strerror(errno));
    return ENVIRONMENT;
}

static int start_named(const char *own, const char *name, char **argv) {
    char target[PATH_MAX];
    if (!strchr(name, '/') && variant_path(target, sizeof target, own, name) &&
        access(target, X_OK) == 0) {
        for (size_t i = 0; i < COUNT; i++)
            if (strcmp(VARIANTS[i].name, name) == 0 && !VARIANTS[i].runs_here())
                fprintf(stderr, "warning: this CPU lacks what %s needs: %s\n", name,
                        VARIANTS[i].needs);
        return start(target, argv);
    }
    fprintf(stderr, "error: WEIGHTSMITH_CPU_VARIANT=%s: no such variant here; unset it or use one of",
            name);
    for (size_t i = 0; i < COUNT; i++)
        if (variant_path(target, sizeof target, own, VARIANTS[i].name) && access(target, X_OK) == 0)
            fprintf(stderr, " %s", VARIANTS[i].name);
    fputc('\n', stderr);
    return USAGE;
}

int main(int argc, char **argv) {
    char own[PATH_MAX], target[PATH_MAX];
    if (argc < 1 || !own_path(own, sizeof own)) {
        fputs("error: cannot find the folder of this program; start it by its full path\n", stderr);
        return ENVIRONMENT;
    }
    const char *named = getenv("WEIGHTSMITH_CPU_VARIANT");
    if (named && *named) return start_named(own, named, argv);
    int there = 0;
    for (size_t i = 0; i < COUNT; i++) {
        if (!variant_path(target, sizeof target, own, VARIANTS[i].name) ||
            access(target, X_OK) != 0)
            continue;
        if (VARIANTS[i].runs_here()) return start(target, argv);
        there++;
    }
    if (!there) {
        fprintf(stderr, "error: no program beside %s in cpu/%s: copy the whole folder\n", own,
                VARIANTS[COUNT - 1].name);
        return ENVIRONMENT;
    }
    fprintf(stderr, "error: no build of this program runs here: the CPU needs %s; "
                    "use a newer machine, or pass the host's CPU through to the guest\n",
            VARIANTS[COUNT - 1].needs);
    return ENVIRONMENT;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The init program of the self-test guest.
 *
 * It fills a stretch of memory with contents that are a function of the page
 * index and of a generation number, keeps checking them, and reports on the
 * console.  A migration that loses, swaps, corrupts or holds back a page is
 * reported by the guest itself.
 *
 * Freestanding: without a C library the program is small, needs nothing from
 * the build machine but a compiler, and keeps its timing to itself.
 *
 * Boot parameters, which the kernel hands over as environment variables:
 *   migmib=N         MiB to fill and check (default 32)
 *   migmode=MODE     idle (read only, the default), dirty or touch
 *   migdirtykib=N    KiB rewritten each second in dirty mode (default 1024)
 *   migtouchus=N     microseconds between two touches in touch mode (default 500)
 *   migtickms=N      milliseconds between two reports (default 200)
 *   migsweepms=N     milliseconds in which all pages are checked once (default 1700)
 *   migpattern=NAME  random (default), sparse, delta or compressible
 *
 * touch reads a word of one page after the other, at random, and reports how
 * many microseconds each touch took that was slow: after a migration in
 * postcopy these are the pages that had to be waited for.
 *
 * random: nothing to compress, no zero pages.
 * sparse: zero pages, pages with one word set, repetitive and random pages;
 *         a page changes kind with each generation.
 * delta:  random, but one generation differs from the next in a few words.
 * compressible: the first half of a page is random, the second one repeats a word.
 */

typedef unsigned long u64;
typedef long i64;

_Static_assert(sizeof(u64) == 8, "this program is for x86-64 only");

enum {
    SYS_WRITE = 1,
    SYS_MMAP = 9,
    SYS_EXIT = 60,
    SYS_CLOCK_GETTIME = 228,
    SYS_CLOCK_NANOSLEEP = 230,
};

enum { CLOCK_MONOTONIC_ID = 1, TIMER_ABSTIME_FLAG = 1 };
enum { PROT_READ_WRITE = 3, MAP_PRIVATE_ANONYMOUS = 0x22 };

enum { PAGE_BYTES = 4096, PAGE_WORDS = PAGE_BYTES / 8, PAGES_PER_MIB = 256 };

#define NSEC_PER_SEC 1000000000UL
#define NSEC_PER_MSEC 1000000UL
#define NSEC_PER_USEC 1000UL

/* Long enough that an idle guest hardly runs. */
#define IDLE_SLICE (50 * NSEC_PER_MSEC)
/* Short enough that dirtying looks continuous to the migration. */
#define DIRTY_SLICE (10 * NSEC_PER_MSEC)
/* Work owed after a pause is dropped beyond this, so that ticks stay regular. */
#define MOST_OWED (100 * NSEC_PER_MSEC)
#define TICK_MSEC 200
/* A touch of memory that is there takes an emulated guest a few microseconds. */
#define SLOW_TOUCH (20 * NSEC_PER_USEC)
/* A little under the two seconds promised for a full sweep. */
#define SWEEP_MSEC 1700
/* Larger memories are swept at the pace of this size, to spare the host. */
#define SWEEP_PAGES_AT_MOST (32 * PAGES_PER_MIB)

enum { REPORTS_AT_MOST = 8 };

enum pattern { PATTERN_RANDOM, PATTERN_SPARSE, PATTERN_DELTA, PATTERN_COMPRESSIBLE };

/* As the names of migmode go. */
enum mode { MODE_IDLE, MODE_DIRTY, MODE_TOUCH };

struct timespec {
    i64 sec;
    i64 nsec;
};

struct guest {
    volatile u64 *memory;
    u64 pages;
    enum pattern pattern;

    /* Pages below `dirty_next` hold `generation` + 1, the others `generation`. */
    u64 generation;
    u64 dirty_next;
    u64 sweep_next;

    u64 dirty_rate; /* pages a second; 0 in idle mode */
    u64 sweep_rate; /* pages a second; 0 where rewriting checks often enough */
    u64 dirty_owed; /* in page nanoseconds: what a rate times a duration gives */
    u64 sweep_owed;

    u64 touch_interval; /* nanoseconds; 0 unless in touch mode */
    u64 touched;

    u64 tick_interval;
    u64 tick;
    u64 checked;
    u64 bad;
};

static i64 syscall6(i64 number, i64 a, i64 b, i64 c, i64 d, i64 e, i64 f)
{
    register i64 r10 __asm__("r10") = d;
    register i64 r8 __asm__("r8") = e;
    register i64 r9 __asm__("r9") = f;
    i64 result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

/* The compiler may call these even in freestanding code. */
void *memset(void *to, int byte, u64 count);
void *memcpy(void *to, const void *from, u64 count);

void *memset(void *to, int byte, u64 count)
{
    void *start = to;

    __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(byte) : "memory");
    return start;
}

void *memcpy(void *to, const void *from, u64 count)
{
    void *start = to;

    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
    return start;
}

/* ---- console ---- */

struct line {
    u64 length;
    char text[160];
};

static void put_text(struct line *line, const char *text)
{
    while (*text && line->length < sizeof(line->text))
        line->text[line->length++] = *text++;
}

static void put_number(struct line *line, u64 number)
{
    char digits[21];
    char *at = digits + sizeof(digits) - 1;

    *at = 0;
    do {
        *--at = (char)('0' + number % 10);
        number /= 10;
    } while (number);
    put_text(line, at);
}

/* One write for a whole line: a migration may then fall between two lines. */
static void put_line(struct line *line)
{
    u64 done = 0;

    put_text(line, "\n");
    while (done < line->length) {
        i64 wrote = syscall6(SYS_WRITE, 1, (i64)(line->text + done),
                             (i64)(line->length - done), 0, 0, 0);
        if (wrote <= 0)
            break;
        done += (u64)wrote;
    }
    line->length = 0;
}

/* Leaving makes the kernel panic, which ends the machine: the host sees it. */
__attribute__((noreturn)) static void give_up(const char *why)
{
    struct line line = {0};

    put_text(&line, "mig-guest: error ");
    put_text(&line, why);
    put_line(&line);
    for (;;)
        syscall6(SYS_EXIT, 1, 0, 0, 0, 0, 0);
}

/* ---- time ---- */

static u64 now(void)
{
    struct timespec time = {0, 0};

    syscall6(SYS_CLOCK_GETTIME, CLOCK_MONOTONIC_ID, (i64)&time, 0, 0, 0, 0);
    return (u64)time.sec * NSEC_PER_SEC + (u64)time.nsec;
}

static void sleep_until(u64 when)
{
    struct timespec time = {(i64)(when / NSEC_PER_SEC), (i64)(when % NSEC_PER_SEC)};

    syscall6(SYS_CLOCK_NANOSLEEP, CLOCK_MONOTONIC_ID, TIMER_ABSTIME_FLAG, (i64)&time, 0, 0, 0);
}

/* ---- page contents ---- */

enum kind { KIND_RANDOM, KIND_ZERO, KIND_ONE_WORD, KIND_REPEATED, KIND_DELTA, KIND_HALF };

struct contents {
    enum kind kind;
    u64 key;     /* depends on page and generation */
    u64 old_key; /* depends on the page alone */
    u64 place;   /* the word that KIND_ONE_WORD sets */
};

/* A bijection, so that no two pages or generations share a key. */
static u64 mix(u64 value)
{
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9UL;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebUL;
    return value ^ (value >> 31);
}

static struct contents contents_of(enum pattern pattern, u64 page, u64 generation)
{
    struct contents contents = {
        .kind = KIND_RANDOM,
        .key = mix((page << 36) + generation + 0x9e3779b97f4a7c15UL),
        .old_key = mix((page << 36) + 0x9e3779b97f4a7c14UL),
        .place = (page * 7 + generation * 31) % PAGE_WORDS,
    };

    if (pattern == PATTERN_DELTA) {
        contents.kind = KIND_DELTA;
    } else if (pattern == PATTERN_COMPRESSIBLE) {
        contents.kind = KIND_HALF;
    } else if (pattern == PATTERN_SPARSE) {
        static const enum kind kinds[] = {KIND_ZERO, KIND_ONE_WORD, KIND_RANDOM, KIND_REPEATED};

        contents.kind = kinds[(page + generation) % 4];
    }
    return contents;
}

/* A multiplication and a fold: cheap when emulated, and does not compress. */
static inline u64 scramble(u64 value)
{
    value *= 0xd6e8feb86659fd93UL;
    return value ^ (value >> 32);
}

/* As the process guest has it: a codec takes as long for the one as for the other. */
static inline u64 half_random(u64 key, u64 index)
{
    return index < PAGE_WORDS / 2 ? mix(key + index * 0x9e3779b97f4a7c15UL) : key;
}

static inline u64 word_of(const struct contents *contents, u64 index)
{
    switch (contents->kind) {
    case KIND_ZERO:
        return 0;
    case KIND_ONE_WORD:
        return index == contents->place ? contents->key | 1 : 0;
    case KIND_REPEATED:
        return contents->key;
    case KIND_DELTA:
        return scramble((index % 64 ? contents->old_key : contents->key) + index);
    case KIND_HALF:
        return half_random(contents->key, index);
    default:
        return scramble(contents->key + index);
    }
}

/* The first word that is not as it should be, or PAGE_WORDS. */
static u64 first_difference(const volatile u64 *page, const struct contents *contents)
{
    u64 index = 0;

    /* The common kind has a loop of its own, without the switch. */
    if (contents->kind == KIND_RANDOM) {
        u64 key = contents->key;

        while (index < PAGE_WORDS && page[index] == scramble(key + index))
            index++;
        return index;
    }
    while (index < PAGE_WORDS && page[index] == word_of(contents, index))
        index++;
    return index;
}

static void write_page(volatile u64 *page, const struct contents *contents)
{
    for (u64 index = 0; index < PAGE_WORDS; index++)
        page[index] = word_of(contents, index);
}

/* ---- checking ---- */

static int holds(const struct guest *guest, u64 page, u64 of_page, u64 generation)
{
    struct contents contents = contents_of(guest->pattern, of_page, generation);

    return first_difference(guest->memory + page * PAGE_WORDS, &contents) == PAGE_WORDS;
}

static int is_zero(const volatile u64 *page)
{
    for (u64 index = 0; index < PAGE_WORDS; index++)
        if (page[index])
            return 0;
    return 1;
}

/* Says what stands there instead: it tells a stale page from a broken one. */
static void put_found(struct line *line, const struct guest *guest, u64 page, u64 generation,
                      u64 word)
{
    const volatile u64 *at = guest->memory + page * PAGE_WORDS;
    u64 back = generation < 64 ? generation : 64;

    if (is_zero(at)) {
        put_text(line, "zeros");
        return;
    }
    for (u64 other = generation - back; other <= generation + 1; other++) {
        if (other != generation && holds(guest, page, page, other)) {
            put_text(line, "generation ");
            put_number(line, other);
            return;
        }
    }
    for (u64 other = 0; other < guest->pages; other++) {
        if (holds(guest, page, other, generation)) {
            put_text(line, "page ");
            put_number(line, other);
            return;
        }
    }
    put_text(line, "other contents from word ");
    put_number(line, word);
}

static void check_page(struct guest *guest, u64 page)
{
    u64 generation = guest->generation + (page < guest->dirty_next);
    struct contents contents = contents_of(guest->pattern, page, generation);
    u64 word = first_difference(guest->memory + page * PAGE_WORDS, &contents);

    guest->checked++;
    if (word == PAGE_WORDS)
        return;
    guest->bad++;
    if (guest->bad <= REPORTS_AT_MOST) {
        struct line line = {0};

        put_text(&line, "mig-guest: corrupt page ");
        put_number(&line, page);
        put_text(&line, " expected generation ");
        put_number(&line, generation);
        put_text(&line, " found ");
        put_found(&line, guest, page, generation, word);
        put_line(&line);
    }
}

static void sweep_one(struct guest *guest)
{
    check_page(guest, guest->sweep_next);
    guest->sweep_next = (guest->sweep_next + 1) % guest->pages;
}

static void dirty_one(struct guest *guest)
{
    u64 page = guest->dirty_next;
    struct contents contents = contents_of(guest->pattern, page, guest->generation + 1);

    check_page(guest, page);
    write_page(guest->memory + page * PAGE_WORDS, &contents);
    guest->dirty_next = page + 1;
    if (guest->dirty_next == guest->pages) {
        guest->dirty_next = 0;
        guest->generation++;
    }
}

/* ---- the program ---- */

static void work(struct guest *guest, u64 elapsed)
{
    if (elapsed > MOST_OWED)
        elapsed = MOST_OWED;
    guest->dirty_owed += guest->dirty_rate * elapsed;
    guest->sweep_owed += guest->sweep_rate * elapsed;
    for (; guest->dirty_owed >= NSEC_PER_SEC; guest->dirty_owed -= NSEC_PER_SEC)
        dirty_one(guest);
    for (; guest->sweep_owed >= NSEC_PER_SEC; guest->sweep_owed -= NSEC_PER_SEC)
        sweep_one(guest);
}

static void report(struct guest *guest)
{
    struct line line = {0};

    put_text(&line, "mig-guest: tick ");
    put_number(&line, ++guest->tick);
    put_text(&line, " checked ");
    put_number(&line, guest->checked);
    put_text(&line, " bad ");
    put_number(&line, guest->bad);
    put_line(&line);
}

/* Whether it is time for a report; then it has been made. */
static int report_in_time(struct guest *guest, u64 time, u64 *next_tick)
{
    if (time < *next_tick)
        return 0;
    report(guest);
    *next_tick += guest->tick_interval;
    if (*next_tick < time)
        *next_tick = time + guest->tick_interval;
    return 1;
}

__attribute__((noreturn)) static void run(struct guest *guest)
{
    u64 slice = guest->dirty_rate ? DIRTY_SLICE : IDLE_SLICE;
    u64 last = now();
    u64 next_tick = last;

    if (slice > guest->tick_interval)
        slice = guest->tick_interval;
    for (;;) {
        u64 time;

        sleep_until(last + slice);
        time = now();
        work(guest, time - last);
        last = time;
        report_in_time(guest, time, &next_tick);
    }
}

/* Touches a page; returns how many nanoseconds that took. */
static u64 touch_one(struct guest *guest)
{
    u64 page = mix(guest->touched++) % guest->pages;
    u64 start = now();

    (void)guest->memory[page * PAGE_WORDS];
    return now() - start;
}

__attribute__((noreturn)) static void run_touching(struct guest *guest)
{
    static const char prefix[] = "mig-guest: slow";
    struct line line = {0};
    u64 next_tick = now();

    put_text(&line, prefix);
    for (;;) {
        u64 took;

        sleep_until(now() + guest->touch_interval);
        took = touch_one(guest);
        if (took >= SLOW_TOUCH) {
            put_text(&line, " ");
            put_number(&line, took / NSEC_PER_USEC);
        }
        /* a number of 20 digits and the end of the line still fit */
        if (line.length > sizeof(line.text) - 24 ||
            (report_in_time(guest, now(), &next_tick) && line.length >= sizeof(prefix))) {
            put_line(&line);
            put_text(&line, prefix);
        }
    }
}

/* The value of an environment variable, or a null pointer. */
static const char *variable(char **environment, const char *name)
{
    for (; *environment; environment++) {
        const char *at = *environment;
        const char *wanted = name;

        while (*wanted && *at == *wanted) {
            at++;
            wanted++;
        }
        if (!*wanted && *at == '=')
            return at + 1;
    }
    return 0;
}

static u64 number_variable(char **environment, const char *name, u64 otherwise)
{
    const char *text = variable(environment, name);
    u64 number = 0;

    if (!text)
        return otherwise;
    if (!*text)
        give_up("a boot parameter that should be a number is empty");
    for (; *text; text++) {
        if (*text < '0' || *text > '9' || number > 1000000000UL)
            give_up("a boot parameter that should be a number is not one");
        number = number * 10 + (u64)(*text - '0');
    }
    return number;
}

/* Which of `names`, ended by a null pointer, the variable holds; the first if unset. */
static int choice_variable(char **environment, const char *name, const char *const *names)
{
    const char *text = variable(environment, name);

    if (!text)
        return 0;
    for (int choice = 0; names[choice]; choice++) {
        const char *left = text;
        const char *right = names[choice];

        while (*left && *left == *right) {
            left++;
            right++;
        }
        if (*left == *right)
            return choice;
    }
    give_up("a boot parameter has a value that is not known");
}

static void fill(struct guest *guest)
{
    i64 address = syscall6(SYS_MMAP, 0, (i64)(guest->pages * PAGE_BYTES), PROT_READ_WRITE,
                           MAP_PRIVATE_ANONYMOUS, -1, 0);

    if (address < 0 && address > -4096)
        give_up("there is not enough memory");
    guest->memory = (volatile u64 *)address;
    for (u64 page = 0; page < guest->pages; page++) {
        struct contents contents = contents_of(guest->pattern, page, 0);

        write_page(guest->memory + page * PAGE_WORDS, &contents);
    }
}

__attribute__((noreturn, used)) void start(u64 *stack)
{
    static const char *const modes[] = {"idle", "dirty", "touch", 0};
    static const char *const patterns[] = {"random", "sparse", "delta", "compressible", 0};
    static struct guest guest;
    struct line line = {0};
    /* The stack holds argc, the arguments, a null pointer, then the environment. */
    char **environment = (char **)(stack + 1 + stack[0] + 1);
    u64 swept;
    u64 sweep_msec;
    int mode;

    guest.pages = number_variable(environment, "migmib", 32) * PAGES_PER_MIB;
    if (!guest.pages)
        give_up("migmib is 0");
    guest.pattern = (enum pattern)choice_variable(environment, "migpattern", patterns);
    guest.tick_interval = number_variable(environment, "migtickms", TICK_MSEC) * NSEC_PER_MSEC;
    mode = choice_variable(environment, "migmode", modes);
    if (mode == MODE_DIRTY)
        guest.dirty_rate = number_variable(environment, "migdirtykib", 1024) * 1024 / PAGE_BYTES;
    if (mode == MODE_TOUCH)
        guest.touch_interval = number_variable(environment, "migtouchus", 500) * NSEC_PER_USEC;
    swept = guest.pages < SWEEP_PAGES_AT_MOST ? guest.pages : SWEEP_PAGES_AT_MOST;
    sweep_msec = number_variable(environment, "migsweepms", SWEEP_MSEC);
    if (!sweep_msec)
        give_up("migsweepms is 0");
    guest.sweep_rate = swept * 1000 / sweep_msec + 1;
    if (guest.dirty_rate >= guest.sweep_rate)
        guest.sweep_rate = 0;

    fill(&guest);
    put_text(&line, "mig-guest: ready");
    put_line(&line);
    if (guest.touch_interval)
        run_touching(&guest);
    run(&guest);
}

/* The kernel enters here with the arguments on the stack and no return address. */
__asm__(".globl _start\n"
        ".type _start, @function\n"
        "_start:\n"
        "    xor %ebp, %ebp\n"
        "    mov %rsp, %rdi\n"
        "    and $-16, %rsp\n"
        "    call start\n"
        "    hlt\n");

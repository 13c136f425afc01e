/* A plugin for qemu-aarch64 that counts the instructions a program executes between marks.
 *
 * A mark is the system call getpgid(0x5EC0000 + n), n < 256, which finds no process: os.getpgid in Python. The plugin
 * then prints "MARK n COUNT" to standard error, COUNT being the instructions since the mark before. Exact for one thread.
 *
 * The interface is declared here because Debian packages no header for it. It is version 1, of qemu 4.2 and later.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define GETPGID 155 /* on aarch64 */
#define FIRST_MARK 0x5EC0000
#define ADD_U64 0

typedef uint64_t plugin_id;
struct qemu_plugin_tb;

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*callback)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int operation, void *counter, uint64_t step);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
typedef void on_syscall(plugin_id id, unsigned cpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3, uint64_t a4,
                        uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id id, on_syscall *callback);

int qemu_plugin_version = 1;

static uint64_t executed;
static uint64_t at_last_mark;

static void count_block(plugin_id id, struct qemu_plugin_tb *block)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &executed, qemu_plugin_tb_n_insns(block));
}

static void print_mark(plugin_id id, unsigned cpu, int64_t number, uint64_t process, uint64_t a2, uint64_t a3,
                       uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    (void)id, (void)cpu, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != GETPGID || (process & ~(uint64_t)255) != FIRST_MARK)
        return;
    fprintf(stderr, "MARK %u %llu\n", (unsigned)(process & 255), (unsigned long long)(executed - at_last_mark));
    at_last_mark = executed;
}

int qemu_plugin_install(plugin_id id, const void *machine, int arguments, char **values)
{
    (void)machine, (void)arguments, (void)values;
    qemu_plugin_register_vcpu_tb_trans_cb(id, count_block);
    qemu_plugin_register_vcpu_syscall_cb(id, print_mark);
    return 0;
}

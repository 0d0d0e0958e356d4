// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/plimsoll-bench/plimsoll/scenarios"
)

const repository = ".."

// Every command of the README is one that this program, the Makefile or go.mod has, with flags that they have. None is run.
func TestReadmeCommandsExist(t *testing.T) {
	check := newCommandChecker(t)
	lines := fencedCommands(check.readme)
	seen := map[string]int{}
	for _, line := range lines {
		program, err := check.line(line)
		if err != nil {
			t.Errorf("README.md: %s: %v", line, err)
		}
		seen[program]++
	}
	// A README that is read wrong has no commands, and then none that is wrong.
	for _, program := range []string{"plimsoll", "make", "go tool"} {
		if seen[program] == 0 {
			t.Errorf("no command of %s in %q", program, lines)
		}
	}
	for _, line := range inlineCommands(check.readme) {
		// A sentence that names a subcommand means no call of it.
		if words := strings.Fields(line); len(words) == 2 && slices.ContainsFunc(subcommands(), func(c *cobra.Command) bool { return c.Name() == words[1] }) {
			continue
		}
		if _, err := check.line(line); err != nil {
			t.Errorf("README.md: %s: %v", line, err)
		}
	}
}

// What the README says benchstat does with the published records, it does.
func TestReadmeBenchstatReadsThePublishedRun(t *testing.T) {
	if testing.Short() {
		t.Skip("builds benchstat: not in -short")
	}
	if os.Getenv("SUDO_UID") != "" {
		t.Skip("under sudo Go would fetch every module once more, for root")
	}
	check := newCommandChecker(t)
	for _, line := range fencedCommands(check.readme) {
		words, err := shellWords(line)
		if err != nil || len(words) < 3 || words[0] != "go" || words[1] != "tool" || words[2] != "benchstat" {
			continue
		}
		cmd := exec.Command(words[0], words[1:]...)
		cmd.Dir = repository
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		// A filter that nothing passes is no error to benchstat.
		for _, text := range []string{"direct", "iptables", "nftables", "ebpf", "\n10000 ", "p50-sec"} {
			if !strings.Contains(string(out), text) {
				t.Errorf("%s does not print %q:\n%s", line, text, out)
			}
		}
		return
	}
	t.Error("README.md has no line with benchstat")
}

// Nothing that the program shows is missing in the list that the README is held against.
func TestSubcommandsAreThoseOfTheHelp(t *testing.T) {
	stdout, _ := mustRun(t, "--help")
	_, shown, _ := strings.Cut(stdout, "Available Commands:\n")
	shown, _, _ = strings.Cut(shown, "\n\n")
	var want, got []string
	for _, line := range strings.Split(shown, "\n") {
		if name := strings.Fields(line)[0]; name != "help" {
			want = append(want, name)
		}
	}
	for _, cmd := range subcommands() {
		got = append(got, cmd.Name())
	}
	slices.Sort(got)
	if !slices.Equal(want, got) {
		t.Errorf("the help shows %v, the list has %v", want, got)
	}
}

// The table of flags lists what plimsoll run has, with the same defaults.
func TestReadmeFlagsOfRun(t *testing.T) {
	check := newCommandChecker(t)
	_, table, _ := strings.Cut(check.readme, "Flags of `run`:\n")
	table, _, _ = strings.Cut(table, "\n## ")
	rows := regexp.MustCompile("(?m)^\\| (`--.*?) \\| (.*?) \\|").FindAllStringSubmatch(table, -1)
	cmd := newRunCommand()
	listed := map[string]bool{"help": true}
	for _, row := range rows {
		names := regexp.MustCompile("`--([a-z-]+)`").FindAllStringSubmatch(row[1], -1)
		defaults := strings.SplitN(row[2], ", ", len(names))
		for i, name := range names {
			listed[name[1]] = true
			flag := cmd.Flags().Lookup(name[1])
			if flag == nil {
				t.Errorf("README.md lists --%s, which plimsoll run has not", name[1])
				continue
			}
			// Defaults in words, "of the profile", are for a reader to check.
			said := strings.Trim(defaults[i], "`")
			if regexp.MustCompile(`^[0-9]+$|^(lab|default|direct)$`).MatchString(said) && said != flag.DefValue {
				t.Errorf("README.md says that --%s is %s by default; it is %s", name[1], said, flag.DefValue)
			}
		}
	}
	for _, name := range regexp.MustCompile(`(?m)^ +(?:-., )?--([a-z-]+)`).FindAllStringSubmatch(cmd.Flags().FlagUsages(), -1) {
		if !listed[name[1]] {
			t.Errorf("plimsoll run --%s is not in README.md", name[1])
		}
	}
	if len(rows) < 10 {
		t.Errorf("%d rows of flags in README.md", len(rows))
	}
}

// What is wrong in a command is found, in each of the ways in which it can be.
func TestReadmeCheckFindsWhatIsWrong(t *testing.T) {
	check := newCommandChecker(t)
	for line, want := range map[string]string{
		"sudo bin/plimsoll run connect --nosuch":                             "unknown flag: --nosuch",
		"bin/plimsoll run --rounds six":                                      "invalid argument",
		"bin/plimsoll run --out":                                             "needs an argument",
		"bin/plimsoll run conect":                                            "no scenario conect",
		"plimsoll measure":                                                   "no such subcommand",
		"bin/plimsoll report results/published/nosuch":                       "no such file",
		"bin/plimsoll compare results/published/lab-default":                 "2 arg",
		"bin/plimsoll list iptables":                                         "unknown command",
		"make benhc":                                                         "no target benhc",
		"make bench PROFIL=quick":                                            "no variable PROFIL",
		"make bench ARGS='--seeds 2'":                                        "unknown flag: --seeds",
		"INSTALL_NOTHING=1 make bench":                                       "no variable INSTALL_NOTHING",
		"make bench PROFILE=slow":                                            "no profile slow",
		"go tool benchstats results/published/lab-default/records.txt":       "no tool benchstats",
		"go tool benchstat -col /mode results/published/nosuch/records.txt":  "no such file",
		"curl -fsSL https://example.org/install.sh":                          "neither",
		"bin/plimsoll doctor 'unfinished":                                    "quote",
		"sudo bin/plimsoll agent --cgroup /sys/fs/cgroup/kubepods.slice now": "unknown command",
	} {
		if _, err := check.line(line); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: the error is %v, want one that says %q", line, err, want)
		}
	}
}

// A commandChecker knows what there is to call.
type commandChecker struct {
	readme   string
	makefile string
	modules  string // go.mod
	help     string // of make
}

func newCommandChecker(t *testing.T) commandChecker {
	t.Helper()
	var c commandChecker
	for name, text := range map[string]*string{"README.md": &c.readme, "Makefile": &c.makefile, "go.mod": &c.modules} {
		b, err := os.ReadFile(filepath.Join(repository, name))
		if err != nil {
			t.Fatal(err)
		}
		*text = string(b)
	}
	cmd := exec.Command("make", "--no-print-directory", "-C", repository, "help")
	// These tests may run below make test, whose settings are not for this one.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "MAKE") || strings.HasPrefix(v, "MFLAGS") })
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("needs make")
	}
	if err != nil {
		t.Fatalf("make help: %v\n%s", err, out)
	}
	c.help = string(out)
	return c
}

// line checks one command line and says whose it is.
func (c commandChecker) line(line string) (program string, err error) {
	words, err := shellWords(line)
	if err != nil {
		return "", err
	}
	var variables []string
	for len(words) > 0 && (words[0] == "sudo" || assignment.MatchString(words[0])) {
		if words[0] != "sudo" {
			variables = append(variables, words[0])
		}
		words = words[1:]
	}
	switch {
	case len(words) > 0 && (words[0] == "bin/plimsoll" || words[0] == "plimsoll"):
		return "plimsoll", c.plimsoll(words[1:])
	case len(words) > 0 && words[0] == "make":
		return "make", c.make(append(variables, words[1:]...))
	case len(words) > 2 && words[0] == "go" && words[1] == "tool":
		if !regexp.MustCompile(`(?m)^\t\S*/` + regexp.QuoteMeta(words[2]) + `$`).MatchString(c.modules) {
			return "go tool", fmt.Errorf("go.mod has no tool %s", words[2])
		}
		return "go tool", published(words[3:])
	}
	return "", errors.New("neither plimsoll nor make nor a tool of go.mod")
}

// plimsoll parses the arguments of a subcommand as the program would, and does not call it.
func (c commandChecker) plimsoll(args []string) error {
	if len(args) == 0 {
		return nil
	}
	for _, cmd := range subcommands() {
		if cmd.Name() != args[0] {
			continue
		}
		cmd, args, err := cmd.Find(args[1:])
		if err != nil {
			return err
		}
		if err := cmd.ParseFlags(args); err != nil {
			return err
		}
		positional := cmd.Flags().Args()
		if err := cmd.ValidateArgs(positional); err != nil {
			return err
		}
		if cmd.Name() == "run" {
			for _, name := range positional {
				if !slices.ContainsFunc(scenarios.Scenarios, func(s scenarios.Scenario) bool { return s.Name() == name }) {
					return fmt.Errorf("no scenario %s", name)
				}
			}
			asked, err := cmd.Flags().GetString("profile")
			if err != nil || !slices.ContainsFunc(profiles, func(p profile) bool { return p.name == asked }) {
				return fmt.Errorf("no profile %s", asked)
			}
		}
		return published(positional)
	}
	return fmt.Errorf("no such subcommand: %s", args[0])
}

// subcommands are those that the program shows; a test holds them against its help.
func subcommands() []*cobra.Command {
	return []*cobra.Command{newRunCommand(), newReportCommand(), newCompareCommand(), newListCommand(), newDoctorCommand(), newCleanCommand(), newAgentCommand(), newStatusCommand(), newDumpCommand(), newEngineCommand(), newAcceptCommand(), newE2ECommand()}
}

// make checks targets and variables; those of make bench become flags of plimsoll run, as in the Makefile.
func (c commandChecker) make(words []string) error {
	run := []string{"run"}
	for _, word := range words {
		name, value, ok := strings.Cut(word, "=")
		switch {
		case !ok && !strings.Contains(c.help, "\n  make "+word+" ") && !strings.HasPrefix(c.help, "  make "+word+" "):
			return fmt.Errorf("make help has no target %s", word)
		case !ok && !strings.Contains(c.makefile, "\n"+word+":"):
			return fmt.Errorf("the Makefile has no target %s", word)
		case ok && !strings.Contains(c.makefile, "$("+name+")"):
			return fmt.Errorf("the Makefile has no variable %s", name)
		case ok && slices.Contains([]string{"PROVIDER", "PROFILE", "OUT"}, name):
			run = append(run, "--"+strings.ToLower(name), value)
		case name == "ARGS":
			args, err := shellWords(value)
			if err != nil {
				return err
			}
			run = append(run, args...)
		}
	}
	return c.plimsoll(run)
}

// published returns an error unless the published runs among the arguments exist.
func published(args []string) error {
	for _, arg := range args {
		if strings.HasPrefix(arg, "results/published/") {
			if _, err := os.Stat(filepath.Join(repository, arg)); err != nil {
				return err
			}
		}
	}
	return nil
}

var (
	assignment = regexp.MustCompile(`^[A-Z_]+=`)
	fence      = regexp.MustCompile("(?ms)^```(?:sh|bash|shell)?\n(.*?)^```$")
	inline     = regexp.MustCompile("`((?:sudo )?(?:(?:bin/)?plimsoll|make) [^`\n]+)`")
)

// fencedCommands returns the command lines of a page's fenced blocks, each in one piece.
func fencedCommands(page string) []string {
	var lines []string
	for _, block := range fence.FindAllStringSubmatch(page, -1) {
		for _, line := range strings.Split(strings.ReplaceAll(block[1], "\\\n", ""), "\n") {
			if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
				lines = append(lines, line)
			}
		}
	}
	return lines
}

// inlineCommands returns the commands that a page's sentences name, some of them without their arguments.
func inlineCommands(page string) []string {
	var lines []string
	for _, match := range inline.FindAllStringSubmatch(fence.ReplaceAllString(page, ""), -1) {
		lines = append(lines, match[1])
	}
	return lines
}

// shellWords splits a line as a shell does, up to a comment. It knows quotes and nothing else of a shell.
func shellWords(line string) ([]string, error) {
	var words []string
	var word strings.Builder
	quote, within := rune(0), false
	for _, c := range line {
		switch {
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(c)
		case c == '\'' || c == '"':
			quote, within = c, true
		case c == '#' && !within:
			return words, nil
		case c == ' ':
			if within {
				words = append(words, word.String())
			}
			word.Reset()
			within = false
		default:
			word.WriteRune(c)
			within = true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("a quote %c is not closed", quote)
	}
	if within {
		words = append(words, word.String())
	}
	return words, nil
}

// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/clusters/lab/labtest"
)

// testBin is where `make build` puts etcd, kube-apiserver and kube-proxy.
const testBin = "../../bin"

func mustStartControlPlane(tb testing.TB) (*ControlPlane, ControlPlaneOptions) {
	tb.Helper()
	o := ControlPlaneOptions{
		Name: fmt.Sprintf("test-%s-%d", strings.ToLower(tb.Name()), os.Getpid()),
		Dir:  tb.TempDir(),
		Bin:  labtest.Bin(tb, testBin),
	}
	c, err := StartControlPlane(tb.Context(), o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := c.Close(ctx); err != nil && !errors.Is(err, fs.ErrNotExist) {
			tb.Error(err)
		}
	})
	return c, o
}

func TestControlPlane(t *testing.T) {
	start := time.Now()
	c, o := mustStartControlPlane(t)
	t.Logf("ready after %v", time.Since(start).Round(10*time.Millisecond))

	// The API, from this process.
	client, err := kubernetes.NewForConfig(c.RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	service, err := client.CoreV1().Services("default").Get(t.Context(), "kubernetes", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := service.Spec.ClusterIP, ipv4.services.Addr().Next().String(); got != want {
		t.Errorf("Service default/kubernetes has address %s, want %s", got, want)
	}

	// Its storage.
	etcd, err := c.Etcd()
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	stored, err := etcd.Get(t.Context(), StoragePrefix+"/services/specs/default/kubernetes", clientv3.WithCountOnly())
	if err != nil {
		t.Fatal(err)
	}
	if stored.Count != 1 {
		t.Errorf("etcd holds %d Services default/kubernetes, want 1", stored.Count)
	}

	// A program with the kubeconfig, through a forwarder as nodes have it.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go c.Forward(l)
	path := filepath.Join(o.Dir, "kubeconfig")
	if err := c.Kubeconfig(path, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		t.Fatal(err)
	}
	forwarded, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	version, err := forwarded.Discovery().ServerVersion()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("Kubernetes %s", version.GitVersion)

	// The host itself has no way there.
	if conn, err := net.DialTimeout("tcp", controlEtcd, time.Second); err == nil {
		conn.Close()
		t.Errorf("etcd answers on the host's own %s", controlEtcd)
	}
	if err := c.Err(); err != nil {
		t.Errorf("Err of a healthy control plane: %v", err)
	}
}

func TestControlPlaneFailure(t *testing.T) {
	c, o := mustStartControlPlane(t)
	if err := c.group.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("nobody noticed that etcd and kube-apiserver are dead")
	}
	if err := c.Err(); err == nil || !strings.Contains(err.Error(), "killed") || !strings.Contains(err.Error(), o.Dir) {
		t.Errorf("Err = %v, want how the program ended and its log", err)
	}
}

func TestControlPlaneStartFailure(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces and cgroups need root")
	}
	bin := t.TempDir()
	for program, script := range map[string]string{
		"etcd":           "#!/bin/sh\necho no room on device >&2\nexit 3\n",
		"kube-apiserver": "#!/bin/sh\nexit 0\n",
	} {
		if err := os.WriteFile(filepath.Join(bin, program), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	name := fmt.Sprintf("test-start-failure-%d", os.Getpid())
	_, err := StartControlPlane(t.Context(), ControlPlaneOptions{Name: name, Dir: t.TempDir(), Bin: bin})
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "no room on device") {
		t.Errorf("error = %v, want etcd's exit status and its last words", err)
	}
	for _, pattern := range []string{host.StateDir, host.MemoryDir} {
		left, err := filepath.Glob(filepath.Join(pattern, "*"+name+"*"))
		if err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}

	_, err = StartControlPlane(t.Context(), ControlPlaneOptions{Name: name, Dir: t.TempDir(), Bin: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("error without programs = %v, want how to make them", err)
	}
}

func TestControlPlaneLeavesNothing(t *testing.T) {
	c, o := mustStartControlPlane(t)
	dir := c.group.Dir
	if err := c.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(host.MemoryDir, "*"+o.Name+"*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left in memory: %v, %v", left, err)
	}
	for _, path := range []string{dir, filepath.Dir(dir), filepath.Join(host.StateDir, o.Name+".json")} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there (%v)", path, err)
		}
	}
}

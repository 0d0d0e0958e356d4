// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// NewClient makes a client from a kubeconfig file, or from the pod's service account if kubeconfig is empty. Content type
// and rates are the defaults of kube-proxy (pkg/proxy/apis/config/v1alpha1/defaults.go).
func NewClient(kubeconfig string) (kubernetes.Interface, error) {
	cfg, err := clientConfig(kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("client configuration: %w", err)
	}
	cfg.ContentType = runtime.ContentTypeProtobuf
	cfg.QPS, cfg.Burst = 5, 10
	return kubernetes.NewForConfig(rest.AddUserAgent(cfg, "plimsoll-agent"))
}

func clientConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig != "" {
		return clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	cfg, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("this is no pod: name a kubeconfig file")
	}
	return cfg, err
}
